"""Every case of the chosen preset: `pytest bench --benchmark-json=run.json`."""


def test_train(peftbench_run):
    """Train and measure one model x adapter x method; the record goes into the JSON."""
    row = peftbench_run()
    assert row["status"] in ("ok", "oom")
