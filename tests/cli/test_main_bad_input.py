"""Whatever is wrong with the input: one line that says so, exit 2, and nothing is written."""

import json
import pathlib
import re
import struct

import numpy as np
import pytest
import tiny_llama

NAN = np.full((tiny_llama.WIDTH, tiny_llama.WIDTH), np.nan, np.float32)
INFINITE = np.where(np.eye(tiny_llama.WIDTH) > 0, np.inf, 0).astype(np.float32)
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
# A recipe that quantizes the first layer's queries and leaves everything else.
RECIPE = """
name = "mine"
[[rules]]
match = "layers/0/attention/q/kernel"
weights = { values = "int8", contracted = "all" }
[[rules]]
match = "*"
leave = true
"""


def listing(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(jaxquant, tmp_path):
    """Runs a command that must fail, leave no file and change none; returns its line."""

    def run(*arguments: object) -> str:
        before = listing(tmp_path)
        folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
        ran = jaxquant(*arguments)
        assert ran.code == 2 and ran.out == "", ran
        assert ran.err.startswith("jaxquant: error: ") and ran.err.count("\n") == 1, ran.err
        assert listing(tmp_path) == before
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
        return ran.err

    return run


WEIGHTS = {
    "nan": ({Q: NAN}, {}, "holds nan"),
    "infinity": ({Q: INFINITE}, {}, "holds inf"),
    "nan in a norm": ({NORM: NAN[0]}, {}, "holds nan"),
    "shape": ({Q: NAN[:32]}, {}, r"has shape \[32, 64\]"),
    "heads": ({}, {"num_key_value_heads": 3}, "3"),
    "architecture": ({}, {"model_type": "mamba"}, "architecture 'mamba'"),
    "no layers": ({}, {"num_hidden_layers": 0}, "layers is 0"),
    "text": ({}, {"hidden_size": "64"}, "hidden_size is '64'"),
    "extra tensor": ({"extra.weight": np.ones(3, np.float32)}, {}, "'extra.weight'"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_and_configs_that_are_wrong(refused, tmp_path, kind):
    arrays, config, sentence = WEIGHTS[kind]
    folder = tiny_llama.write_folder(tmp_path / "model", arrays=arrays, config=config)
    line = refused(
        "quantize", folder, tmp_path / "q", "--recipe", "w8a16", "--json", tmp_path / "q.json"
    )
    assert line == line.strip() + "\n"
    assert re.search(sentence, line), line


def test_a_gguf_cut_at_any_place(refused, tmp_path):
    whole = tiny_llama.write_gguf(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in np.random.default_rng(0).integers(0, len(whole), 20):
        cut.write_bytes(whole[:size])
        assert "cut.gguf" in refused("quantize", cut, tmp_path / "q", "--recipe", "w8a16")


@pytest.mark.parametrize("at", [8, 16, 24], ids=["tensors", "entries", "the first key's length"])
def test_a_gguf_with_a_length_of_2_to_the_63(refused, tmp_path, at):
    path = tiny_llama.write_gguf(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + 8] = struct.pack("<Q", 2**63)
    path.write_bytes(data)
    assert str(2**63) in refused("quantize", path, tmp_path / "q", "--recipe", "w8a16")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("leave", "leaf", "there is no key 'leaf'; the nearest valid one is 'leave'"),
        ("int8", "int9", "'int9'; the nearest valid name is 'int8'"),
        ("kernel", "kernal", "'layers/0/attention/q/kernal' matches nothing"),
        ('"*"', '"*/k/*"', "no rule matches"),
        ("=", "", "is not TOML"),
        ('"all"', "48", "Tiles of 48 do not fill"),
    ],
)
def test_recipes_that_are_misspelt_or_do_not_fit(refused, tmp_path, model, old, new, sentence):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.replace(old, new))
    assert sentence in refused("quantize", model, tmp_path / "q", "--recipe", recipe)


def test_recipes_and_models_that_are_not_there(refused, tmp_path, model):
    line = refused("quantize", model, tmp_path / "q", "--recipe", "w8a15")
    assert "no recipe named 'w8a15'; the nearest is 'w8a" in line
    assert "none.toml" in refused("quantize", model, tmp_path / "q", "--recipe", "none.toml")
    assert "none.gguf" in refused("inspect", tmp_path / "none.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("inspect", tmp_path / "empty")


def test_a_recipe_that_does_nothing(refused, tmp_path, model):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\n[[rules]]\nmatch = "*"\nleave = true\n')
    line = refused("quantize", model, tmp_path / "q", "--recipe", recipe)
    assert "'mine' leaves every weight" in line


def test_places_that_cannot_be_written_to(refused, tmp_path, model):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "jaxquant did not write it" in refused("quantize", model, other, "--recipe", "w8a16")
    out, file = tmp_path / "q", other / "notes.txt"
    assert "jaxquant did not write it" in refused("quantize", model, file, "--recipe", "w8a16")
    for target, sentence in ((other, "is a folder"), (tmp_path / "no" / "a.json", "no folder")):
        arguments = ("quantize", model, out, "--recipe", "w8a16", "--json", target)
        assert sentence in refused(*arguments)
        assert sentence in refused("inspect", model, "--json", target)


def test_a_model_that_is_quantized_already(refused, tmp_path, quantized):
    line = refused("quantize", quantized, tmp_path / "again", "--recipe", "w8a16")
    assert "is quantized already, by the recipe 'w8a16'" in line


def test_a_checkpoint_of_ours_that_was_damaged(refused, quantized, tokens):
    largest = max(quantized.rglob("arrays/*/*/*"), key=lambda path: path.stat().st_size)
    files = [p for p in (quantized).rglob("*") if p.is_file() and p.name != "manifest.json"]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert largest.name in refused("inspect", quantized)
    assert largest.name in refused("evaluate", quantized, "--tokens", tokens)
    manifest = quantized / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert "manifest.json" in refused("inspect", quantized)


def test_tokens_that_do_not_fit(refused, tmp_path, model):
    def line(path):
        return refused("evaluate", model, "--tokens", path)

    assert "none.npz" in line(tmp_path / "none.npz")
    beyond = tiny_llama.write_tokens(tmp_path / "beyond.npz", highest=10 * tiny_llama.VOCAB)
    assert "256 in its vocabulary" in line(beyond)
    np.savez(tmp_path / "floats.npz", tokens=np.zeros((2, 3)))
    assert "float64[2, 3]" in line(tmp_path / "floats.npz")
    assert "no .npz file" in line(model / "config.json")


CALIBRATED = ("--recipe", "gptq_w4_sym_g64")


def test_a_recipe_that_needs_data_and_one_that_needs_none(refused, tmp_path, model, tokens):
    out = tmp_path / "q"
    line = refused("quantize", model, out, *CALIBRATED)
    assert "'gptq_w4_sym_g64' needs data at 14 sites, layers/0/attention/q/kernel#dot" in line
    assert "Give --calibration FILE: text, or a .npz file" in line
    line = refused("quantize", model, out, "--recipe", "w8a16", "--calibration", tokens)
    assert "'w8a16' needs no data" in line and "Leave out --calibration" in line
    for option in (("--resume",), ("--windows", 3), ("--length", 8), ("--forward", "bfloat16")):
        line = refused("quantize", model, out, "--recipe", "w8a16", *option)
        assert f"{option[0]} is about calibration, and there is none" in line


def bad_data(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """What calibration data may be: a file, and what is said of it."""
    ids = np.zeros((3, 8), np.int32)
    found = {
        "missing": (None, "missing.npz: No such file"),
        "empty": ({"tokens": ids[:0]}, r"shape \[0, 8\] leave nothing"),
        "one token": ({"tokens": ids[:, :1]}, r"at least 1 window of at least 2 tokens"),
        "beyond": ({"tokens": ids + tiny_llama.VOCAB}, "holds 256 at position 0, but the vocab"),
        "negative": ({"tokens": ids - 1}, "-1 is among these"),
        "floats": ({"tokens": ids.astype(np.float32)}, r"these are float32\[3, 8\]"),
        "flat": ({"tokens": ids[0]}, r"these are int32\[8\]"),
        "other key": ({"ids": ids}, "holds 'ids'. A .npz file with an integer array 'tokens'"),
    }
    cases = {}
    for name, (arrays, sentence) in found.items():
        path = folder / f"{name}.npz"
        if arrays is not None:
            np.savez(path, **arrays)
        cases[name] = (path, sentence)
    for name, content, sentence in (
        ("text.npz", b"words " * 400, "no .npz file"),
        ("short.txt", b"too short", "9 tokens, which do not fill one window of 512"),
        ("bytes.txt", b"\xff\xfe" * 600, "is not UTF-8 text .* use a .npz file"),
        ("none.txt", None, "none.txt: No such file"),
    ):
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        cases[name] = (path, sentence)
    return cases


def test_calibration_data_that_does_not_fit(refused, tmp_path, model):
    for path, sentence in bad_data(tmp_path).values():
        line = refused("quantize", model, tmp_path / "q", *CALIBRATED, "--calibration", path)
        assert re.search(sentence, line), line


def test_a_model_that_overflows_on_the_data(jaxquant, tmp_path, tokens):
    # Finite weights, whose outputs are finite too, but not the product of the two.
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    arrays = {name: tiny_llama.weights()[name] * np.float32(1e25) for name in names}
    model = tiny_llama.write_folder(tmp_path / "model", arrays=arrays)
    ran = jaxquant("quantize", model, tmp_path / "q", *CALIBRATED, "--calibration", tokens)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "rows of the inputs of layers/0/mlp/down/kernel hold NaN or infinity" in ran.err
    assert not (tmp_path / "q").exists()


def test_text_that_does_not_fit(refused, tmp_path, model):
    path = tmp_path / "a.txt"
    path.write_text("too short")
    assert "9 tokens, which do not fill" in refused("evaluate", model, "--text", path)
    path.write_bytes(b"\xff\xfe" * 600)
    assert "is not UTF-8 text" in refused("evaluate", model, "--text", path)
    path.write_text("long enough " * 100)
    silent = tiny_llama.write_folder(tmp_path / "silent", tokenizer=False)
    assert "tokenizer.json is missing" in refused("evaluate", silent, "--text", path)


def test_a_reference_with_another_vocabulary(refused, tmp_path, model, tokens):
    other = tiny_llama.write_folder(tmp_path / "other", config={"vocab_size": 300})
    line = refused("evaluate", model, "--tokens", tokens, "--against", other)
    assert "256 tokens in its vocabulary" in line and "300" in line


def test_benches_and_demos_that_cannot_run(refused, tmp_path, quantized, model):
    assert "is quantized already" in refused("bench", "decode", "--model", quantized)
    assert "no model and no recipe" in refused("bench", "layer", "--recipe", "w8a16")
    same = ("bench", "decode", "--model", model, "--recipe", "w8a16", "--recipe", "W8A16")
    assert "'w8a16' is taken" in refused(*same)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused("demo", "--out", file / "below")


def test_a_config_that_is_no_json(refused, tmp_path, model):
    (model / "config.json").write_text(json.dumps([1]))
    assert "config.json" in refused("inspect", model)
