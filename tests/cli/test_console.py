"""JSON is written whole or not at all; tables and bars keep to their place."""

import json

import pytest

from jaxquant.cli._console import bar, check_json, say, show, table, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"nll": 0.1})
    assert json.loads(path.read_text()) == {"nll": 0.1}
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"nll": bad})
    assert json.loads(path.read_text()) == {"nll": 0.1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    write_json(None, {})


def test_places_are_checked_before_the_work(tmp_path):
    check_json(None)
    check_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is a folder"):
        check_json(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        check_json(tmp_path / "none" / "a.json")


def test_a_line_is_printed_as_it_stands(capsys):
    say("[red]layers/[0] " + "x" * 150)
    assert capsys.readouterr().out == "[red]layers/[0] " + "x" * 150 + "\n"


def test_a_table_keeps_to_100_columns(capsys):
    made = table("tensor", "bits")
    made.add_row("layers/0/" + "x" * 120, "4.25")
    show(made)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_where_there_is_no_terminal_there_is_no_bar(capsys):
    with bar("working") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
