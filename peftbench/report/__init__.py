"""One HTML file out of result files, which fetches nothing: jinja2 and plotly, never torch.

sources (files -> parts: sessions that belong together) -> cases, takeaways, changes, sparklines,
samples, origin (what each section shows) -> html (the page, its scripts inlined)
"""
