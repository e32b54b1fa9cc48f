"""Folders in and out: logits against transformers, round trips bit for bit, the tokenizer, the hub, refusals."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax.io import hf, tensors
from alignax.models import TransformerConfig, rope, transformer

GOLDENS = pathlib.Path(__file__).parents[1] / "vectors" / "hf"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 5000.0,
}
SCRATCH = {
    "LlamaForCausalLM": {"rope_scaling": rope.Llama3Scaling(factor=4.0, original_max_positions=32)},
    "Qwen2ForCausalLM": {"qkv_bias": True, "tie_embeddings": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "rope_scaling": rope.LinearScaling(factor=2.0)},
}


@functools.cache
def golden(case):
    return hf.load(GOLDENS / case), dict(np.load(GOLDENS / case / "expected.npz"))


def full_logits(model, params, tokens, segments=None):
    tokens = jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)

    @jax.jit
    def forward(params):
        return model.logits(params, model.hidden(params, tokens, segments).states)

    return np.asarray(forward(params))


def stepper(model, params):
    @functools.partial(jax.jit, donate_argnums=1)
    def step(tokens, cache, positions):
        out = model.hidden(params, tokens[:, None], jnp.ones_like(tokens)[:, None], positions=positions, cache=cache)
        return model.logits(params, out.states)[:, 0], out.cache

    return step


def greedy(model, params, prompt, count):
    """The prompt and `count` greedy tokens, one position at a time through the cache."""
    step, cache = stepper(model, params), model.init_cache(1, len(prompt) + count)
    ids = list(prompt)
    for position in range(len(prompt) + count - 1):
        logits, cache = step(jnp.asarray(ids[position : position + 1]), cache, jnp.full((1, 1), position))
        if position == len(ids) - 1:
            ids.append(int(np.argmax(logits[0])))
    return ids


def random_params(model):
    """Normal numbers everywhere, made by numpy: nothing to compile."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.3, leaf.shape).astype(np.float32)), shapes)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def copy_golden(tmp_path, name="llama2"):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    return folder


def edit_json(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def scratch():
    model = transformer(TransformerConfig(**TINY))
    return model, random_params(model)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_ragged_rows_equal_transformers(case):
    loaded, expected = golden(case)
    tokens = expected["tokens"]
    valid = np.arange(tokens.shape[1]) < expected["lengths"][:, None]
    logits = full_logits(loaded.model, loaded.params, tokens, valid.astype(np.int32))
    np.testing.assert_allclose(logits[valid], expected["logits"][valid], rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_cached_decode_of_ragged_rows_equals_transformers(case):
    loaded, expected = golden(case)
    tokens, lengths = expected["tokens"], expected["lengths"]
    prefix = np.minimum(lengths, [8, 5, 1])
    prompts = jnp.asarray(np.where(np.arange(8) < prefix[:, None], tokens[:, :8], 0))
    segments = jnp.asarray(np.arange(8) < prefix[:, None], jnp.int32)
    cache = loaded.model.init_cache(len(tokens), tokens.shape[1])
    first = jax.jit(loaded.model.hidden)(loaded.params, prompts, segments, cache=cache)
    logits = np.asarray(loaded.model.logits(loaded.params, first.states))
    step, cache, compared = stepper(loaded.model, loaded.params), first.cache, 0
    for row, length in enumerate(prefix):
        np.testing.assert_allclose(logits[row, :length], expected["logits"][row, :length], rtol=0, atol=2e-4)
    for position in prefix + np.arange(tokens.shape[1])[:, None]:
        running = position < lengths
        position = np.minimum(position, tokens.shape[1] - 1)
        logits, cache = step(jnp.asarray(tokens[range(3), position]), cache, jnp.asarray(position)[:, None])
        wanted = expected["logits"][range(3), position][running]
        np.testing.assert_allclose(np.asarray(logits)[running], wanted, rtol=0, atol=2e-4)
        compared += running.sum()
    assert compared == (lengths - prefix).sum() == 50


@pytest.mark.parametrize("case", ["llama3", "qwen3"])
def test_greedy_tokens_equal_transformers(case):
    loaded, expected = golden(case)
    wanted = expected["greedy"].tolist()
    assert greedy(loaded.model, loaded.params, wanted[:8], len(wanted) - 8) == wanted


@pytest.fixture(scope="module")
def stories(shared):
    return hf.load(shared / "models/stories260K-hf"), json.loads((shared / "spec/oracles/stories260K.json").read_text())


def test_stories_logits_and_greedy_tokens(stories):
    loaded, oracle = stories
    ids = oracle["greedy_from_bos_ids"]
    logits = full_logits(loaded.model, loaded.params, [ids[:3]])[0]
    np.testing.assert_allclose(logits, oracle["logits_first3_float64"], rtol=0, atol=2e-4)
    assert greedy(loaded.model, loaded.params, ids[:1], 200) == ids
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == oracle["greedy_from_bos_text"]
    assert loaded.eos_ids == (1, 2)


def test_stories_likelihood_of_texts(stories):
    loaded, oracle = stories
    for text in oracle["texts"]:
        ids = text["ids"]
        assert loaded.tokenizer(text["text"])["input_ids"] == ids
        logits = full_logits(loaded.model, loaded.params, [ids[:-1]])[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(-logp[range(len(ids) - 1), ids[1:]].mean(), text["mean_nll"], rtol=0, atol=1e-5)


def test_stories_tokenizer_encodes_as_the_original(stories):
    loaded, oracle = stories
    assert {text: loaded.tokenizer(text)["input_ids"] for text in oracle["encode"]} == oracle["encode"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_load_save_load_is_bit_equal(tmp_path, case, limit):
    loaded = hf.load(GOLDENS / case)
    hf.save(tmp_path / "out", loaded.model, loaded.params, max_shard_bytes=limit)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (limit == 20_000)
    again = hf.load(tmp_path / "out")
    assert_same_bits(loaded.params, again.params)
    assert again.model.config == loaded.model.config
    assert again.eos_ids == loaded.eos_ids and again.generation == loaded.generation
    original = load_file(GOLDENS / case / "model.safetensors")
    saved = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < limit + 5_000
        saved |= load_file(file)
    assert saved.keys() == original.keys()
    assert all(saved[name].tobytes() == original[name].tobytes() for name in original)


def test_shard_index_lists_every_tensor_and_the_total(tmp_path, scratch):
    hf.save(tmp_path / "out", *scratch, max_shard_bytes=3000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))] and len(files) > 3
    held = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == held
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # all as readable as config.json
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(scratch[1]))


def test_config_keeps_what_it_does_not_know(tmp_path):
    folder = copy_golden(tmp_path, "llama3")
    edit_json(folder / "config.json", our_note={"a": 1}, eos_token_id=[2, 5], torch_dtype="float32")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7, 9], temperature=0.6)
    loaded = hf.load(folder)
    assert loaded.eos_ids == (2, 7, 9)
    hf.save(tmp_path / "out", loaded.model, loaded.params)
    config = json.loads((tmp_path / "out/config.json").read_text())
    before = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "dtype"} == {k: v for k, v in before.items() if k != "torch_dtype"}
    assert config["dtype"] == "float32"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7, 9] and generation["temperature"] == 0.6
    hf.save(tmp_path / "other", loaded.model, loaded.params, eos_ids=[4])
    assert hf.load(tmp_path / "other").eos_ids == (4,) and hf.load(tmp_path / "other").config["eos_token_id"] == 4


def test_config_follows_the_model_when_that_was_changed(tmp_path):
    loaded = hf.load(GOLDENS / "llama3")
    config = dataclasses.replace(loaded.model.config, rope_theta=777.0, rope_scaling=None, max_positions=64)
    hf.save(tmp_path / "out", transformer(config), loaded.params)
    again = hf.load(tmp_path / "out")
    assert again.model.config == config and hash(again.model.config) == hash(config)
    assert again.config["bos_token_id"] == 1


@pytest.mark.parametrize("architecture", SCRATCH)
def test_model_from_scratch_is_saved_as_its_family(tmp_path, architecture):
    from transformers import AutoConfig

    config = TransformerConfig(**TINY, **SCRATCH[architecture])
    model = transformer(config)
    params = random_params(model)
    hf.save(tmp_path / "out", model, params, eos_ids=[3, 4])
    loaded = hf.load(tmp_path / "out")
    assert loaded.config["architectures"] == [architecture]
    fields = [field.name for field in dataclasses.fields(config)]
    assert [getattr(loaded.model.config, name) for name in fields] == [getattr(config, name) for name in fields]
    assert loaded.eos_ids == (3, 4) and loaded.tokenizer is None
    assert_same_bits(params, loaded.params)
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.architectures == [architecture] and theirs.eos_token_id == [3, 4] and theirs.bos_token_id is None
    assert theirs.rope_parameters["rope_theta"] == 5000.0 and theirs.head_dim == 8
    if config.rope_scaling is not None:
        assert theirs.rope_parameters["factor"] == config.rope_scaling.factor


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("asked", ["bfloat16", "float32"])
def test_dtypes_are_converted_once(tmp_path, stored, asked):
    folder = copy_golden(tmp_path)
    values = {k: v.astype(jnp.dtype(stored)) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(values, folder / "model.safetensors")
    loaded = hf.load(folder, dtype=jnp.dtype(asked), compute_dtype=jnp.float32)
    kernel = np.asarray(loaded.params["layers"]["attn"]["q"]["kernel"][1])
    wanted = values["model.layers.1.self_attn.q_proj.weight"].T.astype(jnp.dtype(asked))
    assert kernel.dtype == jnp.dtype(asked) and kernel.tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert loaded.model.config.dtype == jnp.float32 and loaded.model.config.param_dtype == jnp.dtype(asked)
    hf.save(tmp_path / "out", loaded.model, loaded.params)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == asked
    assert {v.dtype for v in load_file(tmp_path / "out/model.safetensors").values()} == {jnp.dtype(asked)}


def test_nan_is_saved_as_it_is(tmp_path, scratch):
    model, params = scratch
    params["final_norm"]["scale"] = jnp.asarray(np.where(np.arange(16) == 3, np.nan, 1.0), jnp.float32)
    hf.save(tmp_path / "out", model, params)
    assert_same_bits(params, hf.load(tmp_path / "out").params)


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4, "user": 5, ":": 6}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    )


def test_tokenizer_and_chat_template_travel_with_the_model(tmp_path, scratch):
    tokenizer = small_tokenizer()
    hf.save(tmp_path / "out", *scratch, tokenizer)
    loaded = hf.load(tmp_path / "out")
    assert loaded.tokenizer("hello world nothing")["input_ids"] == [3, 4, 0]
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.eos_ids == (2,) and loaded.config["bos_token_id"] == 1


def test_eos_falls_back_to_config_and_then_to_the_tokenizer(tmp_path, scratch):
    hf.save(tmp_path / "out", *scratch, small_tokenizer(), eos_ids=[7, 8])
    (tmp_path / "out/generation_config.json").unlink()
    assert hf.load(tmp_path / "out").eos_ids == (7, 8)
    edit_json(tmp_path / "out/config.json", eos_token_id=None)
    assert hf.load(tmp_path / "out").eos_ids == (2,)
    hf.save(tmp_path / "bare", *scratch)
    assert hf.load(tmp_path / "bare").eos_ids == ()


def test_importing_the_tokenizer_says_nothing_about_torch(tmp_path, scratch):
    hf.save(tmp_path / "out", *scratch, small_tokenizer())
    code = (
        f"from alignax.io import hf; assert hf.load({str(tmp_path / 'out')!r}).tokenizer('hello')['input_ids'] == [3]"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "PyTorch" not in done.stderr, done.stderr


def test_mesh_loads_straight_into_the_shards_of_the_rules(tmp_path):
    script = pathlib.Path(__file__).with_name("mesh_script.py")
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(script), str(GOLDENS), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["qwen2_untied", "qwen3"]


def test_rules_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match="rules were given without a mesh"):
        hf.load(GOLDENS / "llama2", rules=[])


def test_hub_id_is_fetched_without_pickles_or_code(monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(GOLDENS / "llama2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = hf.load("someone/tiny-llama", revision="v1")
    assert loaded.model.config.vocab_size == 96
    assert asked["repo_id"] == "someone/tiny-llama" and asked["revision"] == "v1"
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    refused = ["pytorch_model.bin", "modeling_x.py", "original/params.json", "consolidated.safetensors", "x.pt"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files + refused, **patterns)) == files


def test_hub_that_cannot_be_reached_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="someone/absent: there is no such folder here, and the Hugging Face hub did"):
        hf.load("someone/absent")
    with pytest.raises(ValueError, match="neither a folder nor the name of a repository"):
        hf.load(tmp_path / "absent")


def test_lm_head_of_a_tied_model_must_equal_the_embedding(tmp_path):
    folder = copy_golden(tmp_path, "qwen2")
    values = load_file(folder / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(values, folder / "model.safetensors")
    assert_same_bits(hf.load(folder).params, hf.load(GOLDENS / "qwen2").params)
    values["lm_head.weight"][3, 4] += 1
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        hf.load(folder)


def test_code_in_the_folder_is_never_run(tmp_path):
    folder = copy_golden(tmp_path)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}})
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load(folder)
    (folder / "tokenizer_config.json").unlink()
    assert hf.load(folder).model.config.vocab_size == 96
    edit_json(folder / "config.json", architectures=["EvilForCausalLM"])
    with pytest.raises(ValueError, match=r"'EvilForCausalLM' is not supported.*LlamaForCausalLM.*never run"):
        hf.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_config_that_is_missing_or_broken(tmp_path, content):
    folder = copy_golden(tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (there is no such file|is not JSON|holds a list)"):
        hf.load(folder)


def test_errors_of_a_config_name_the_folder(tmp_path):
    folder = copy_golden(tmp_path)
    edit_json(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ValueError, match=r"llama2: config\.json: rope type 'yarn' is not supported"):
        hf.load(folder)


def test_save_refuses_a_folder_that_exists(tmp_path, scratch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        hf.save(tmp_path / "out", *scratch)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        hf.save(tmp_path / "out/precious.txt", *scratch)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", *scratch)
    assert_same_bits(hf.load(tmp_path / "empty").params, scratch[1])


def test_save_that_fails_leaves_nothing(tmp_path, scratch, monkeypatch):
    def no_space(*args):
        raise OSError("no space left")

    monkeypatch.setattr(tensors, "write", no_space)
    with pytest.raises(OSError, match="no space left"):
        hf.save(tmp_path / "out", *scratch)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_parameters_of_another_model(tmp_path, scratch):
    model, params = scratch
    wrong = {
        "only one of the two has head/kernel": {k: v for k, v in params.items() if k != "head"},
        "only one of the two has lora": {**params, "lora": jnp.ones(2)},
        r"'embed/embedding' is float32 \(31, 16\)": {**params, "embed": {"embedding": jnp.ones((31, 16))}},
        "'embed/embedding' is int32": {**params, "embed": {"embedding": jnp.ones((32, 16), jnp.int32)}},
    }
    for message, tree in wrong.items():
        with pytest.raises(ValueError, match=message):
            hf.save(tmp_path / "out", model, tree)
    with pytest.raises(TypeError, match="only a TransformerConfig has a Hugging Face form"):
        hf.save(tmp_path / "out", model._replace(config=None), params)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        hf.save(tmp_path / "out", model, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        both = dataclasses.replace(model.config, qkv_bias=True, qk_norm=True)
        hf.save(tmp_path / "out", transformer(both), params)
    assert list(tmp_path.iterdir()) == []


# Below: against transformers itself, where torch is installed.


def theirs(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return torch, AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def live_compare(folder, model, params, vocab_size):
    torch, other = theirs(folder)
    tokens = np.random.default_rng(5).integers(3, vocab_size, (2, 30))
    with torch.no_grad():
        wanted = other(input_ids=torch.tensor(tokens)).logits.numpy()
        generated = other.generate(
            torch.tensor(tokens[:1, :6]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    np.testing.assert_allclose(full_logits(model, params, tokens), wanted, rtol=0, atol=2e-4)
    assert greedy(model, params, tokens[0, :6].tolist(), 20) == generated[0].tolist()


@pytest.mark.parametrize("limit", [3000, 10**9])
@pytest.mark.parametrize("architecture", SCRATCH)
def test_transformers_computes_and_generates_the_same_from_what_was_saved(tmp_path, architecture, limit):
    pytest.importorskip("torch")
    model = transformer(TransformerConfig(**TINY, **SCRATCH[architecture]))
    params = random_params(model)
    hf.save(tmp_path / "out", model, params, max_shard_bytes=limit)
    live_compare(tmp_path / "out", model, params, TINY["vocab_size"])


@pytest.mark.parametrize("case", CASES)
def test_transformers_agrees_on_goldens_loaded_and_saved(tmp_path, case):
    pytest.importorskip("torch")
    loaded = hf.load(GOLDENS / case)
    hf.save(tmp_path / "out", loaded.model, loaded.params)
    live_compare(tmp_path / "out", loaded.model, loaded.params, 96)


def test_transformers_continues_the_story_of_the_saved_folder(tmp_path, shared):
    pytest.importorskip("torch")
    oracle = json.loads((shared / "spec/oracles/stories260K.json").read_text())
    loaded = hf.load(shared / "models/stories260K-hf")
    hf.save(tmp_path / "out", loaded.model, loaded.params, loaded.tokenizer)
    torch, other = theirs(tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {text: tokenizer(text)["input_ids"] for text in oracle["encode"]} == oracle["encode"]
    assert other.generation_config.eos_token_id == [1, 2]
    ids = other.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, pad_token_id=0)[0].tolist()
    assert ids == oracle["greedy_from_bos_ids"]


@pytest.mark.parametrize("bad", ["2", True, [2, [3]], [None], 2.0, -1, 10**6])
def test_an_eos_that_is_no_token_is_refused(tmp_path, scratch, bad):
    hf.save(tmp_path / "out", *scratch, eos_ids=[1])
    edit_json(tmp_path / "out/generation_config.json", eos_token_id=bad)
    with pytest.raises(ValueError, match=r"eos_token_id=.*expected token ids, integers from 0 to below"):
        hf.load(tmp_path / "out")


def test_an_eos_that_is_no_token_is_not_written(tmp_path, scratch):
    with pytest.raises(ValueError, match=r"eos_token_id=\[1000000\]; expected token ids"):
        hf.save(tmp_path / "out", *scratch, eos_ids=[10**6])
    assert not (tmp_path / "out").exists()
