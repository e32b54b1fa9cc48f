"""Run by hf_test.py in a process with eight simulated devices: folders loaded onto a mesh, against numpy."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from alignax import sharding
from alignax.io import hf, tensors

# Written out, not taken from the library: where some leaves must lie on a mesh (data 2, model 4), fsdp over data.
RULES = (
    (r"embed/embedding$", P("tensor", "data")),
    (r"(q|k|v|gate|up)/kernel$", P(None, "data", "tensor")),
    (r"(o|down)/kernel$", P(None, "tensor", "data")),
    (r"(q|k|v)/bias$", P("data", "tensor")),
    (r"head/kernel$", P("data", "tensor")),
    (r".*", P()),
)
PARTS = {
    "embed/embedding": (4, 2),
    "layers/attn/q/kernel": (1, 2, 4),
    "layers/attn/o/kernel": (1, 4, 2),
    "layers/attn/k/bias": (2, 4),
    "layers/mlp/down/kernel": (1, 4, 2),
    "final_norm/scale": (1,),
}


class Recorder:
    """A tensor view that counts what is read of it."""

    def __init__(self, view, reads):
        self.view, self.reads = view, reads

    def __getitem__(self, index):
        values = self.view[index]
        self.reads.append(values.size)
        return values


def numpy_leaf(name, values):
    names = {
        "embed/embedding": "model.embed_tokens.weight",
        "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
        "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
        "layers/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
        "final_norm/scale": "model.norm.weight",
    }
    if "{}" not in names[name]:
        return values[names[name]]
    layers = [values[names[name].format(layer)] for layer in range(2)]
    return np.stack([layer.T if layer.ndim == 2 else layer for layer in layers])


def check_case(goldens, out, case):
    mesh = sharding.make_mesh(data=2, tensor=4)
    sharded = hf.load(goldens / case, mesh=mesh, rules=RULES)
    values = load_file(goldens / case / "model.safetensors")
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(sharded.params)}
    for name, parts in PARTS.items():
        if name in leaves:
            whole = numpy_leaf(name, values)
            assert len(leaves[name].addressable_shards) == 8
            for shard in leaves[name].addressable_shards:
                assert shard.data.shape == tuple(size // part for size, part in zip(whole.shape, parts)), name
                np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    expected = np.load(goldens / case / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])
    valid = np.arange(tokens.shape[1]) < expected["lengths"][:, None]
    model = sharded.model
    forward = jax.jit(lambda p: model.logits(p, model.hidden(p, tokens, jnp.asarray(valid, jnp.int32)).states))
    np.testing.assert_allclose(np.asarray(forward(sharded.params))[valid], expected["logits"][valid], rtol=0, atol=2e-4)
    default = hf.load(goldens / case, mesh=mesh)
    assert default.params["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, None, "tensor")
    hf.save(out / case, model, sharded.params, max_shard_bytes=20_000)
    again = hf.load(out / case)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again.params, sharded.params)


def check_score(goldens):
    """Rules are found in the paths under "backbone"; the score itself is on every device."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    loaded = hf.load(goldens.with_name("score") / "llama", mesh=mesh, rules=RULES)
    values = load_file(goldens.with_name("score") / "llama/model.safetensors")
    query, score = loaded.params["backbone"]["layers"]["attn"]["q"]["kernel"], loaded.params["score"]["kernel"]
    assert query.sharding.spec == P(None, "data", "tensor") and score.sharding.spec == P()
    np.testing.assert_array_equal(np.asarray(query), numpy_leaf("layers/attn/q/kernel", values))
    np.testing.assert_array_equal(np.asarray(score), values["score.weight"].T)


def check_fused(goldens, case):
    """Parts of one tensor on a mesh: those that one device reads, which the logits of other tests prove."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    sharded, alone = hf.load(goldens / case, mesh=mesh, rules=RULES).params, hf.load(goldens / case).params
    assert sharded["layers"]["attn"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 8, 4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), sharded, alone)


def check_reads_are_slices(goldens):
    """No shard's reading takes more of a tensor than the shard holds, and no part is read twice."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    where = jax.sharding.NamedSharding(mesh, P(None, None, "tensor"))
    with tensors.open_folder(goldens / "qwen3") as found:
        up = {"up": {"kernel": jax.ShapeDtypeStruct((2, 32, 48), np.float32)}}
        leaf = tensors.plan(up, {"up/kernel": "model.layers.{}.mlp.up_proj.weight"})[0]
        reads = []
        recorded = {name: found[name]._replace(view=Recorder(found[name].view, reads)) for name in leaf.names}
        tensors.read(leaf, recorded, where)
    assert reads == [32 * 48 // 4] * 8, reads


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_reads_are_slices(pathlib.Path(sys.argv[1]))
    check_score(pathlib.Path(sys.argv[1]))
    for case in ("gpt2", "gpt_neox", "phi3"):
        check_fused(pathlib.Path(sys.argv[1]), case)
    for case in ("qwen2_untied", "qwen3"):
        check_case(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), case)
        print(case)
