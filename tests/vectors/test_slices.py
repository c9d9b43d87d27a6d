"""What is stored whole, what is packed, and how both are cut into slices."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jit
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._vectors import layouts, sharding, slices

MESHES = {
    "1": {"d": 1},
    "6": {"d": 6},
    "8": {"d": 8},
    "3x2": {"a": 3, "b": 2},
    "2x2x2": {"x": 2, "y": 2, "z": 2},
}

TREE = {
    "bias": (7,),
    "bfloat16": (5, 9),
    "empty": (0, 256),
    "one": (1, 1, 1),
    "scalar": (),
    "tall": (256, 10),
    "tower": (256, 10),  # stored with the other of its shape
    "wide": (5, 512),
}
DTYPES = {"bfloat16": "bfloat16", "tower": "bfloat16", "wide": "float16"}


def make_mesh(name):
    sizes = MESHES[name]
    devices = np.array(jax.devices()[: math.prod(sizes.values())])
    return Mesh(devices.reshape(*sizes.values()), tuple(sizes))


def make_tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), DTYPES.get(name, "float32"))
        for name, shape in TREE.items()
    }


def layout_of(shapes):
    return layouts.Layout(None, tuple(shapes))


def on_mesh(mesh, tree):
    layout = layouts.layout_of(tree)
    specs = [P()] * len(layout.shapes)
    place = sharding.place_on_mesh(mesh, specs, layout.groups, layout.stored)
    return layouts.Layout(layout.treedef, layout.shapes, place)


def on_axes(names, tree):
    layout = layouts.layout_of(tree)
    place = sharding.place_on_axes(
        names, len(layout.shapes), len(layout.groups), layout.stored
    )
    return layouts.Layout(layout.treedef, layout.shapes, place)


# --- what is stored ----------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, whole",
    [
        ((), False),
        ((7,), False),
        ((256,), False),  # vectors are packed whatever their size
        ((50257,), False),
        ((50257, 768), True),
        ((7, 256), True),
        ((256, 10), True),
        ((3, 3, 64, 64), False),
        ((3, 3, 64, 512), True),
        ((255, 257), False),
        ((128, 128), False),  # 256 divides the product, but no dimension
        ((0, 256), False),
        ((256, 1), True),
    ],
)
def test_which_leaves_are_stored_whole(shape, whole):
    layout = layout_of([shape, (3,)])
    assert layout.groups == (((0,),) if whole else ())
    assert layout.small == ((1,) if whole else (0, 1))
    assert (layout.stored[0] == (1, *shape)) == whole


@pytest.mark.parametrize(
    "size, step",
    [
        (1, 8),
        (2**15, 8),
        (2**18, 8),
        (2**19 - 1, 8),
        (2**19, 16),
        (2**20 - 1, 16),
        (2**20, 256),
        (2**23, 256),
        (2**24, 512),
        (60_192_808, 1024),  # ResNet-152
    ],
)
def test_rows_of_the_slab(size, step):
    """A multiple of 2^floor(log2(n / 2^15)), at least 8, or 256 from 2^20 numbers."""
    small = min(size, 200_000)
    whole = size - small  # as one leaf of some shape that is stored whole
    shapes = [(small,)]
    if whole:
        shapes += [(256, whole // 256), (whole % 256,)]
        small += whole % 256
    layout = layout_of(shapes)
    assert layout.size == size
    rows, lanes = layout.stored[-1]
    assert lanes == 128 and rows % step == 0
    assert 0 <= rows * lanes - small < step * lanes


def test_a_tree_of_large_leaves_has_no_slab():
    assert layout_of([(256, 3), (2, 512)]).stored == ((1, 256, 3), (1, 2, 512))


def test_leaves_of_one_shape_are_one_array():
    layout = layout_of([(256, 3), (7,), (3, 256), (256, 3), (3, 256), (256, 3)])
    assert layout.groups == ((0, 3, 5), (2, 4)) and layout.small == (1,)
    assert layout.stored == ((3, 256, 3), (2, 3, 256), (8, 128))


# --- packing -----------------------------------------------------------------------


def assert_same(tree, other):
    """Leaf for leaf, in whatever they lie."""
    leaves = jax.tree.leaves(tree), jax.tree.leaves(other)
    chex.assert_trees_all_equal_shapes_and_dtypes(*leaves)
    chex.assert_trees_all_equal(*leaves)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_scatter_and_gather_are_inverse(mesh):
    tree = make_tree()
    leaves = jax.tree.leaves(tree)
    layout = layouts.layout_of(tree) if mesh is None else None
    layout = layout or on_mesh(make_mesh(mesh), tree)

    @jax.jit
    def there_and_back(leaves):
        packed = slices.scatter(layout, leaves)
        return packed, slices.gather(packed, [x.dtype for x in leaves])

    packed, back = there_and_back(leaves)
    assert_same(back, leaves)
    assert tuple(x.shape for x in packed.leaves) == layout.stored
    assert [x.dtype for x in packed.leaves] == ["float32", "float16", "float32"]
    np.testing.assert_array_equal(packed.leaves[0][1], np.float32(tree["tower"]))
    # Small leaves lie one after the other, zeros behind them.
    small = [np.ravel(np.float32(leaves[i])) for i in layout.small]
    small = np.concatenate(small)
    slab = np.ravel(packed.leaves[-1])
    np.testing.assert_array_equal(slab[: len(small)], small)
    assert len(slab) == 1024 and not slab[len(small) :].any()


def test_rows_of_vectors_unpack_as_the_vectors_do():
    tree = make_tree()
    layout = on_mesh(make_mesh("8"), tree)
    dtypes = [jnp.float32] * len(TREE)

    def unpack(*packed):
        rows = jax.tree.map(lambda *x: jnp.stack(x), *packed)
        return slices.gather(rows, dtypes), [slices.gather(p, dtypes) for p in packed]

    vectors = [jax.tree.leaves(make_tree(seed)) for seed in range(3)]
    pack = jit(lambda v: slices.scatter(layout, [x.astype("float32") for x in v]))
    packed = map(pack, vectors)
    rows, each = jit(unpack)(*packed)
    for i, vector in enumerate(each):
        assert_same([x[i] for x in rows], vector)


# --- where slices lie --------------------------------------------------------------

SIZES = (
    (("d", 8),),
    (("d", 6),),
    (("a", 3), ("b", 2)),
    (("data", 4), ("model", 2)),
    (("x", 2), ("y", 2), ("z", 2)),
    (("data", 16), ("model", 1), ("slice", 4)),
)


def splits(spec, shape, size):
    """In how many parts a spec splits each dimension."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return [math.prod(size[a] for a in sharding.axes_of(e)) for e in entries]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "shape", [(256, 10), (7, 256), (3, 512, 2), (96, 128), (688, 128), (255, 256)]
)
def test_slices_use_all_axes_that_divide_and_keep_the_own_partitioning(sizes, shape):
    size = dict(sizes)
    first = sizes[0][0]
    for own in (P(), P(first), P(None, first)):
        if any(n % w for n, w in zip(shape, splits(own, shape, size), strict=True)):
            continue
        spec = sharding.slice_spec(shape, own, sizes)
        ways = splits(spec, shape, size)
        assert not any(n % w for n, w in zip(shape, ways, strict=True))
        for mine, kept in itertools.zip_longest(spec, own):
            kept = sharding.axes_of(kept)
            assert sharding.axes_of(mine)[: len(kept)] == kept
        # The best of every assignment of free axes to dimensions, restated.
        used = {a for entry in own for a in sharding.axes_of(entry)}
        free = [a for a in size if a not in used]
        most = 0
        for chosen in itertools.product([None, *range(len(shape))], repeat=len(free)):
            parts = splits(own, shape, size)
            for axis, dim in zip(free, chosen, strict=True):
                if dim is not None:
                    parts[dim] *= size[axis]
            if not any(n % w for n, w in zip(shape, parts, strict=True)):
                most = max(most, math.prod(parts))
        assert math.prod(ways) == most


@pytest.mark.parametrize(
    "shape, own, sizes, expected",
    [
        ((256, 256), P(), (("d", 8),), P("d")),
        # A row of one beside 256 fills a tile; 16 beside 16 leaves most of it empty.
        ((16, 256), P(), (("d", 16),), P("d")),
        ((256, 16), P(), (("d", 16),), P(None, "d")),
        ((256, 10), P(None, "m"), (("d", 8), ("m", 2)), P("d", "m")),
        ((256, 3), P("d"), (("d", 8), ("m", 2)), P(("d", "m"))),
        ((256, 3), P("d"), (("d", 8), ("m", 3)), P("d", "m")),
        ((8, 128), P(), (("d", 6),), P()),
        ((8, 128), P(), (("a", 3), ("b", 2)), P("b")),
        ((256, 3), P(), (("d", 1),), P()),
    ],
)
def test_which_split_is_chosen(shape, own, sizes, expected):
    assert sharding.slice_spec(shape, own, sizes) == expected


def test_the_placement_under_named_axes_does_not_know_how_many_devices():
    layout = on_axes(("a", "b"), make_tree())
    both = ("a", "b")
    expected = (P(None, both), P(None, None, both), P(both))
    assert layout.placement.slice_specs == expected


def test_axes_of_both_types_in_one_mesh():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 4), ("a", "e"), kinds)
    x = jnp.arange(64.0).reshape(8, 8)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, mesh, P(("a", "e"))))(x)
        assert jax.typeof(y).sharding.spec == P("e", None)
        assert y.addressable_shards[0].data.shape == (1, 8)
        np.testing.assert_array_equal(y, x)


def test_new_zeros_are_made_where_they_belong():
    tree, mesh = make_tree(), make_mesh("2x2x2")
    layout = on_mesh(mesh, tree)
    for make in (slices.new_zeros, jax.jit(slices.new_zeros, static_argnums=(0, 1))):
        zeros = make(layout, (3,))
        for x, shape, spec in zip(
            zeros.leaves, layout.stored, layout.placement.slice_specs, strict=True
        ):
            chex.assert_shape(x, (3, *shape))
            assert not np.any(x)
            assert x.sharding.is_equivalent_to(
                NamedSharding(mesh, sharding.with_rows(spec, 1)), x.ndim
            )
            assert x.addressable_shards[0].data.size == x.size // 8


# --- inner products ----------------------------------------------------------------


def rows_and_vector():
    rng = np.random.default_rng(0)
    layout = layouts.layout_of(make_tree())
    draw = rng.standard_normal
    rows = tuple(jnp.asarray(draw((3, *s)), "float32") for s in layout.stored)
    vector = tuple(jnp.asarray(draw(s), "float32") for s in layout.stored)
    expected = sum(
        np.float64(r).reshape(3, -1) @ np.float64(x).reshape(-1)
        for r, x in zip(rows, vector, strict=True)
    )
    return rows, vector, expected


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_inner_counts_each_number_once(mesh):
    """Six devices cannot split these leaves, three of six not either."""
    rows, vector, expected = rows_and_vector()
    layout = layouts.layout_of(make_tree())
    if mesh is not None:
        layout = on_mesh(make_mesh(mesh), make_tree())

    @jax.jit
    def product(rows, vector):
        rows, vector = (layouts.Packed(x, layout) for x in (rows, vector))
        return slices.on_slices(layout, lambda inner, *a: inner(*a), rows, vector)

    np.testing.assert_allclose(product(rows, vector), expected, rtol=2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mesh", ["6", "8", "3x2", "2x2x2"])
def test_slices_under_named_axes(mesh, check_vma):
    """Cut, put together, averaged and multiplied inside `shard_map`."""
    mesh = make_mesh(mesh)
    names, size = mesh.axis_names, mesh.size
    tree = jax.tree.map(lambda x: x.astype("float32"), make_tree())
    leaves = jax.tree.leaves(tree)
    layout = on_axes(names, tree)
    dtypes = [x.dtype for x in leaves]
    rows, vector, expected = rows_and_vector()

    def local(leaves, offset, rows, vector):
        cut = slices.scatter(layout, leaves)
        whole = slices.gather(cut, dtypes)
        # Each device has its own numbers, the mean of which is wanted.
        own = [x + offset[0] for x in leaves]
        mean = slices.gather(slices.scatter(layout, own, mean=True), dtypes)
        vector = slices.cut(layouts.Packed(vector, layout))
        rows = [slices.cut(layouts.Packed(tuple(r), layout)) for r in rows]
        rows = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        product = slices.on_slices(layout, lambda inner, *a: inner(*a), rows, vector)
        share = sum(x.size for x in cut.leaves) * jnp.ones(1)
        return whole, mean, product, share

    rows = [list(r) for r in zip(*rows, strict=True)]
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(names), P(), P()),
        out_specs=(P(), P(), P(), P(names)),
        check_vma=check_vma,
    )
    offset = jnp.arange(float(size))
    whole, mean, product, share = jax.jit(mapped)(leaves, offset, rows, vector)
    assert_same(whole, leaves)
    for x, y in zip(mean, leaves, strict=True):
        np.testing.assert_allclose(x, y + (size - 1) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product, expected, rtol=2e-5)
    stored = sum(map(math.prod, layout.stored))
    np.testing.assert_array_equal(share, stored // size if size == 8 else stored)


# --- noise -------------------------------------------------------------------------


def noise_on(layout):
    bits = jnp.asarray([1, 2, 3], jnp.uint32)
    packed = jax.jit(lambda: slices.cut(layouts.noise(layout, bits)))()
    return [np.asarray(x) for x in packed.leaves]


@pytest.mark.parametrize("mesh", MESHES)
def test_noise_does_not_depend_on_the_devices(mesh):
    expected = noise_on(layouts.layout_of(make_tree()))
    layout = on_mesh(make_mesh(mesh), make_tree())
    bits = jnp.asarray([1, 2, 3], jnp.uint32)

    @jax.jit
    def make():
        noise = layouts.noise(layout, bits)
        return slices.on_slices(layout, lambda _, x: x, noise)

    for x, y in zip(make().leaves, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_looks_uniform(seed):
    n = 512 * 300
    layout = layout_of([(512, 300), (300, 512)])
    bits = jax.random.bits(jax.random.key(seed), (2,), jnp.uint32)
    first, second = (np.float64(x[0]) for x in layouts.noise(layout, bits).leaves)
    assert first.min() >= -1 and first.max() < 1
    for x in (first, second):
        sigma = 5 / np.sqrt(n)
        assert abs(np.mean(x)) < sigma / np.sqrt(3)
        assert abs(np.mean(x**2) - 1 / 3) < sigma * np.sqrt(4 / 45)
        counts, _ = np.histogram(x, 16, (-1, 1))
        assert np.all(np.abs(counts - n / 16) < 5 * np.sqrt(n / 16))
        for moved in (x[1:] * x[:-1], x[:, 1:] * x[:, :-1], x[2:] * x[:-2]):
            assert abs(np.mean(moved)) < 5 / 3 / np.sqrt(moved.size)
    assert abs(np.mean(first.ravel() * second.ravel())) < 5 / 3 / np.sqrt(n)
    other = layouts.noise(layout, bits + 1).leaves[0][0]
    assert abs(np.mean(first * np.float64(other))) < 5 / 3 / np.sqrt(n)


@pytest.mark.parametrize(
    "shape, stored_alone",
    [
        ((768, 3072), True),
        ((50257, 768), True),
        ((3, 3, 512, 512), True),
        ((768, 12, 64), True),
        # A chip of 256 would hold (16, 16, 3, 3): eight times its size in tiles.
        ((16, 16, 3, 768), False),
        ((512, 16), False),
    ],
)
def test_in_a_large_model_what_splits_into_padding_is_packed(shape, stored_alone):
    large = layout_of([shape, (1024, 1024)])
    assert (len(large.groups) == 2) == stored_alone
    assert not large.small if stored_alone else large.small == (0,)
    assert layout_of([shape]).groups == ((0,),)  # no one splits a small model so far
