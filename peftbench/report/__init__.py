"""One HTML file out of result files: jinja2 and plotly, never torch; nothing is fetched by the page.

    sources (files -> parts: sessions that belong together) -> cases, takeaways, changes, sparklines,
    samples, origin (what each section shows) -> html (the page, its scripts inlined)
"""
