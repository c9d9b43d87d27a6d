"""Collectives read from compiled programs whose traffic is known by hand.

Run as a program, with a topology and a directory, this file compiles the same programs
for a TPU: libtpu belongs into a process of its own.
"""

import functools
import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax.app.plan import collectives, hlo
from dho2_jax.app.plan import topology as topologies
from dho2_jax.app.plan.collectives import Loop, Total

ROWS = 64  # rows of 128 numbers that each device holds


def programs(devices):
    """Returns functions with abstract arguments, by name, on a mesh of one axis."""
    mesh = Mesh(np.array(devices), ("x",))
    size = len(devices)

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def local(function, *specs, out):
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
        )

    def turn(x):
        return jax.lax.ppermute(x, "x", [(i, (i + 1) % size) for i in range(size)])

    def nest(x):
        def inner(_, y):
            return jnp.sin(jax.lax.psum(y, "x"))

        def outer(i, y):
            return jax.lax.fori_loop(0, 5, inner, y) + i

        return jax.lax.fori_loop(2, 5, outer, x)

    def choose(x, flag):
        return jax.lax.cond(flag, lambda y: jax.lax.psum(y, "x"), lambda y: y, x)

    def until(x, count):
        return jax.lax.fori_loop(0, count, lambda _, y: turn(y) * 2, x)

    def layers(weights, x):
        def loss(weights):
            h = x
            for w in weights:
                h = jnp.tanh(h @ w)
            return jnp.mean(h**2)

        value, grads = jax.value_and_grad(loss)(weights)
        return value, jax.tree.map(jnp.subtract, weights, grads)

    rows = array((ROWS * size, 128), P("x"))
    whole = array((ROWS * size, 128), P())
    sizes = [array((size * i,), P("x")) for i in range(1, 9)]
    weights = [array((1024, 1024), P("x")) for _ in range(3)]
    copies = [array((1024, 1024), P()) for _ in range(3)]
    batch = array((128 * size, 1024), P("x"))
    gather = functools.partial(jax.lax.all_gather, axis_name="x", tiled=True)
    return {
        "psum": (local(lambda x: jax.lax.psum(x, "x"), P("x"), out=P()), rows),
        "tuple": (
            local(lambda *x: jax.lax.psum(x, "x"), *[P("x")] * 8, out=P()),
            *sizes,
        ),
        "gather": (local(gather, P("x"), out=P()), rows),
        "gather_bfloat16": (
            local(lambda x: gather(x.astype(jnp.bfloat16)), P("x"), out=P()),
            rows,
        ),
        "scatter": (
            local(lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P(), out=P("x")),
            whole,
        ),
        "exchange": (
            local(
                lambda x: jax.lax.all_to_all(x, "x", 0, 1, tiled=True),
                P(None, "x"),
                out=P("x"),
            ),
            array((16 * size, 128 * size), P(None, "x")),
        ),
        "loop": (
            local(
                lambda x: jax.lax.fori_loop(0, 7, lambda _, y: turn(y) * 2, x),
                P("x"),
                out=P("x"),
            ),
            rows,
        ),
        "until": (local(until, P("x"), P(), out=P("x")), rows, array((), P(), int)),
        "nest": (local(nest, P("x"), out=P("x")), rows),
        "choose": (
            local(choose, P("x"), P(), out=P("x")),
            rows,
            array((), P(), bool),
        ),
        "data_parallel": (layers, copies, batch),
        "fsdp": (layers, weights, batch),
    }


def texts(devices):
    return {
        name: jax.jit(function).lower(*arguments).compile().as_text()
        for name, (function, *arguments) in programs(devices).items()
    }


@pytest.fixture(scope="module")
def cpu():
    return texts(jax.devices())


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    directory = tmp_path_factory.mktemp("hlo")
    subprocess.run(
        [sys.executable, __file__, "v5e:4x4", str(directory)],
        env=topologies.environment(topologies.parse("v5e:4x4")),
        check=True,
        capture_output=True,
    )
    return {path.stem: path.read_text() for path in directory.iterdir()}


def only(text):
    (found,) = collectives.read(text)
    return found


# kind and numbers with D devices; on a TPU the scatter is an all-reduce and a slice
FLAT = {
    "psum": ("all-reduce", lambda d: ROWS * 128),
    "tuple": ("all-reduce", lambda d: 36),
    "gather": ("all-gather", lambda d: d * ROWS * 128),
    "scatter": ("reduce-scatter", lambda d: d * ROWS * 128),
    "exchange": ("all-to-all", lambda d: d * 16 * 128),
    "data_parallel": ("all-reduce", lambda d: 3 * 1024**2 + 1),
}


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@pytest.mark.parametrize("name", FLAT)
def test_one_collective(where, name, request):
    found = only(request.getfixturevalue(where)[name])
    kind, numbers = FLAT[name]
    if (where, name) == ("tpu", "scatter"):
        kind = "all-reduce"
    devices = {"cpu": 8, "tpu": 16}[where]
    assert (found.kind, found.numbers) == (kind, numbers(devices))
    assert (found.bytes, found.dtypes) == (4 * found.numbers, ("f32",))
    assert (found.loops, found.trips, found.in_conditional) == ((), 1, False)
    assert found.replica_groups and found.channel
    assert found.name or kind != FLAT[name][0]  # the compiler's own has no name


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_loops_multiply(where, request):
    texts = request.getfixturevalue(where)
    found = only(texts["loop"])
    assert found.kind == "collective-permute" and found.trips == 7
    assert found.replica_groups.startswith("{{0,1},")
    size = ROWS * 128
    totals = collectives.summary([found])
    assert totals == {found.kind: Total(7, 7 * size, 28 * size)}
    once = collectives.summary([found], loops=False)
    assert once == {found.kind: Total(1, size, 4 * size)}

    found = only(texts["nest"])
    assert [loop.trips for loop in found.loops] == [3, 5] and found.trips == 15
    assert found.loops[1].body == found.computation != found.loops[0].body
    (inside,) = collectives.within_loop([found], 3)
    assert inside.trips == 5 and inside.loops == found.loops[1:]
    assert collectives.within_loop([found], 5) == []

    found = only(texts["until"])
    assert found.trips is None and found.numbers == size
    assert collectives.summary([found])[found.kind].count == 1


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_branches_are_flagged(where, request):
    found = only(request.getfixturevalue(where)["choose"])
    assert found.in_conditional and found.kind == "all-reduce"
    assert found.numbers == ROWS * 128


def test_trip_counts_without_xlas_note(cpu):
    for name, trips in {"loop": [7], "nest": [3, 5]}.items():
        text = cpu[name].replace("known_trip_count", "forgotten")
        assert [loop.trips for loop in only(text).loops] == trips


def test_bfloat16_gather_has_half_the_bytes(tpu):
    found = only(tpu["gather_bfloat16"])
    assert found.numbers == 16 * ROWS * 128
    assert (found.bytes, found.dtypes) == (2 * found.numbers, ("bf16",))


def test_gather_spread_over_fusions_is_one(tpu):
    text = tpu["fsdp"]
    assert "AsyncCollectiveStart" in text and text.count(" all-gather(") > 3
    totals = collectives.summary(collectives.read(text))
    size = 1024**2
    assert totals == {
        "all-gather": Total(3, 3 * size, 6 * size),  # the matrix unit reads bfloat16
        "all-reduce": Total(1, 3 * size + 1, 4 * (3 * size + 1)),
    }


def test_fsdp_on_cpu(cpu):
    # The partitioner moves activations where that is less; the gathers stay.
    found = collectives.read(cpu["fsdp"])
    gathers = [one for one in found if one.kind == "all-gather"]
    assert [one.numbers for one in gathers][:3] == [1024**2] * 3


ENTRY = """\
HloModule handmade

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
{more}
ENTRY %main (p: f32[8,128], q: bf16[3]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %q = bf16[3]{{0}} parameter(1)
  {body}
  ROOT %r = f32[8,128]{{1,0}} copy(%p)
}}
"""
GROUPS = "channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"


def handmade(body, more=""):
    return collectives.read(ENTRY.format(body=body, more=more))


@pytest.mark.parametrize(
    ("body", "kind", "numbers", "size"),
    [
        (
            "%s = (f32[8,128], f32[32,128]) all-gather-start(%p), GROUPS\n"
            "  %d = f32[32,128] all-gather-done(%s)",
            "all-gather",
            4096,
            16384,
        ),
        (
            "%s = ((f32[8,128], bf16[3]), (f32[32,128], bf16[12]), u32[], u32[]) "
            "all-gather-start(%p, %q), GROUPS\n"
            "  %d = (f32[32,128], bf16[12]) all-gather-done(%s)",
            "all-gather",
            4108,
            16408,
        ),
        (
            "%s = f32[8,128] all-reduce-start(f32[8,128]{1,0:T(8,128)} %p), GROUPS, "
            "to_apply=%sum\n  %d = f32[8,128] all-reduce-done(%s)",
            "all-reduce",
            1024,
            4096,
        ),
        (
            "%s = ((f32[8,128]), f32[2,128], s32[]) reduce-scatter-start(%p), GROUPS\n"
            "  %d = f32[2,128] reduce-scatter-done(%s)",
            "reduce-scatter",
            1024,
            4096,
        ),
    ],
)
def test_start_and_done_are_one(body, kind, numbers, size):
    (found,) = handmade(body.replace("GROUPS", GROUPS))
    assert (found.kind, found.numbers, found.bytes) == (kind, numbers, size)
    assert found.replica_groups == "[2,4]<=[4,2]T(1,0)"


def test_names_without_percent_signs():
    text = ENTRY.format(
        body="s = (f32[8,128], bf16[3], bf16[3], bf16[3], bf16[3], /*index=5*/bf16[3]) "
        "all-reduce(p, q, q, q, q, /*index=5*/q), replica_groups={}, to_apply=sum",
        more="",
    )
    (found,) = collectives.read(text.replace("%", ""))
    assert (found.numbers, found.bytes) == (1024 + 15, 4096 + 30)
    assert found.dtypes == ("f32", "bf16")


def called(name, opcode="all-reduce"):
    return (
        f"\n%{name} (x: f32[8,128]) -> f32[8,128] {{\n"
        "  %x = f32[8,128] parameter(0)\n"
        f"  ROOT %y = f32[8,128] {opcode}(%x), channel_id=7, replica_groups={{}}\n}}\n"
    )


def test_called_computations():
    twice = (
        "%s = f32[8,128] call(%p), to_apply=%work\n"
        "  %t = f32[8,128] call(%s), to_apply=%work"
    )
    assert len(handmade(twice, called("work"))) == 2
    once = (
        "%s = ((f32[8,128]), f32[8,128]) async-start(%p), calls=%work\n"
        "  %u = ((f32[8,128]), f32[8,128]) async-update(%s), calls=%work\n"
        "  %d = f32[8,128] async-done(%u), calls=%work"
    )
    (found,) = handmade(once, called("work", "all-to-all"))
    assert found.kind == "all-to-all" and found.computation == "work"
    fused = "%s = f32[2,128] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = handmade(fused, called("all-reduce-scatter.1"))
    assert (found.kind, found.numbers) == ("reduce-scatter", 1024)
    spread = (
        "%s = f32[8,128] fusion(%p), kind=kCustom, calls=%begin\n"
        "  %t = f32[8,128] fusion(%s), kind=kCustom, calls=%end"
    )
    assert len(handmade(spread, called("begin") + called("end"))) == 1


def test_loops_that_are_not_counted():
    # The bound changes, the step is no constant, the comparison is another one.
    source = """\
HloModule loops
%cond (s: (s32[], s32[], f32[4])) -> pred[] {
  %s = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (s: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {
  %s = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[4] get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %j = s32[] add(%i, %two)
  %y = f32[4] all-reduce(%x), replica_groups={}
  ROOT %t = (s32[], s32[], f32[4]) tuple(%j, %n, %y)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %nine = s32[] constant(9)
  %t = (s32[], s32[], f32[4]) tuple(%zero, %nine, %x)
  %w = (s32[], s32[], f32[4]) while(%t), condition=%cond, body=%body
  ROOT %r = f32[4] get-tuple-element(%w), index=2
}
"""
    assert only(source).loops == (Loop("body", 5),)  # 0, 2, 4, 6, 8
    for old, new in (
        ("tuple(%j, %n, %y)", "tuple(%j, %j, %y)"),
        ("tuple(%j, %n, %y)", "tuple(%n, %n, %y)"),
        ("add(%i, %two)", "multiply(%i, %two)"),
        ("direction=LT", "direction=NE"),
        ("constant(9)", "parameter(1)"),
    ):
        changed = source.replace(old, new)
        assert changed != source and only(changed).trips is None, (old, new)
    # What XLA noted wins over what the condition tells.
    noted = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    changed = source.replace("body=%body", noted).replace("=LT", "=NE")
    assert only(changed).trips == 7


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="must be an HLO module"):
        hlo.parse("module @jit_f { }")


def main(topology, directory):
    devices = topologies.devices(topologies.parse(topology))
    for name, text in texts(devices).items():
        (pathlib.Path(directory) / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
