"""The plot is a PNG that does not change from run to run."""

from jaxquant.cli._demo_plot import write_plot


def row(name: str, size: float, kl: float, speed: float) -> dict:
    timing = {"tokens_per_second": speed, "ratio": speed / 100}
    return {"name": name, "bytes": size, "kl": kl, "prefill": timing, "decode": timing}


ROWS = [row("float32", 5e8, 0.0, 100), row("w8a16", 2e8, 0.004, 150), row("int4", 1e8, 0.4, 50)]


def test_the_same_rows_give_the_same_picture(tmp_path):
    write_plot(tmp_path / "a.png", ROWS)
    write_plot(tmp_path / "b.png", ROWS)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    assert first == (tmp_path / "b.png").read_bytes()


def test_a_recipe_that_loses_nothing_is_still_shown(tmp_path):
    write_plot(tmp_path / "a.png", [*ROWS, row("lossless", 3e8, 0.0, 90)])
    assert (tmp_path / "a.png").exists()
