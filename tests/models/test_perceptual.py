"""LPIPS against a NumPy forward pass that knows torchvision's layout, and distances by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from jaxllm.errors import InputError
from jaxllm.models.perceptual import LPIPS, feature_distance, import_lpips

# torchvision's configuration of VGG16; M is a max pool. A convolution is followed by a ReLU, so it
# takes two places in `features`, a pool takes one.
LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@pytest.fixture(scope="module")
def files():
    rng = np.random.default_rng(0)
    vgg, index, channels, taps = {}, 0, 3, []
    for item in LAYOUT:
        if item == "M":
            taps.append(channels)
            index += 1
        else:
            w = rng.standard_normal((item, channels, 3, 3), np.float32) * (2 / 9 / channels) ** 0.5
            vgg[f"features.{index}.weight"] = w
            vgg[f"features.{index}.bias"] = rng.normal(0, 0.1, item).astype(np.float32)
            channels, index = item, index + 2
    lin = {
        f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, c, 1, 1)).astype(np.float32)
        for i, c in enumerate(taps)
    }
    return vgg, lin


def lpips_numpy(vgg, lin, a, b):
    """Distance of two NCHW images in [-1, 1]."""

    def features(x):
        shift = np.array([-0.030, -0.088, -0.188])[:, None, None]
        scale = np.array([0.458, 0.448, 0.450])[:, None, None]
        x, index, maps = (x - shift) / scale, 0, []
        for item in LAYOUT:
            if item == "M":
                maps.append(x)
                h, w = x.shape[1] // 2, x.shape[2] // 2
                x = x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2).max((2, 4))
                index += 1
            else:
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                windows = sliding_window_view(padded, (3, 3), (1, 2))
                x = np.tensordot(vgg[f"features.{index}.weight"], windows, ((1, 2, 3), (0, 3, 4)))
                x = np.maximum(x + vgg[f"features.{index}.bias"][:, None, None], 0)
                index += 2
        return maps

    total = 0
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        x, y = (z / (np.sqrt((z**2).sum(0, keepdims=True)) + 1e-10) for z in (x, y))
        w = lin[f"lin{i}.model.1.weight"][0, :, 0, 0]
        total += np.einsum("chw,c->hw", (x - y) ** 2, w).mean()
    return total


def test_imported_lpips_matches_numpy(files):
    vgg, lin = files
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 2, 3, 18, 34))
    expected = [lpips_numpy(vgg, lin, x, y) for x, y in zip(a, b, strict=True)]
    # The file of the whole classifier can be given as it is.
    graphdef, state = nnx.split(import_lpips(vgg | {"classifier.0.bias": np.zeros(2)}, lin))
    distance = jax.jit(lambda state, x, y: nnx.merge(graphdef, state)(x, y))
    x, y = (jnp.asarray(z.transpose(0, 2, 3, 1), jnp.float32) for z in (a, b))
    np.testing.assert_allclose(distance(state, x, y), expected, rtol=1e-4)
    np.testing.assert_allclose(distance(state, x, y), distance(state, y, x), rtol=1e-6)
    # Squares of float32 rounding: the compiler need not treat the two passes alike.
    np.testing.assert_allclose(distance(state, x, x), 0, atol=1e-12)


def test_parameters_and_shapes_of_the_full_network():
    model = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(state))]
    # 14,714,688 is the size of VGG16 without its classifier; five lin layers see 1,472 channels.
    assert sum(sizes) == 14_714_688 + 1472
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    maps = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s).vgg(x), state, image)
    assert [m.shape[1:] for m in maps] == [
        *((224, 224, 64), (112, 112, 128), (56, 56, 256), (28, 28, 512), (14, 14, 512))
    ]
    out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x, x), state, image)
    assert out.shape == (2,) and out.dtype == jnp.float32


def test_feature_distance_by_hand():
    # (3, 4) -> (0.6, 0.8); (1, 0) stays: squared differences 0.16 and 0.64. The second position
    # is equal in direction, so the mean over two positions halves the sum.
    a = [jnp.array([[[[3.0, 4.0], [0.0, 2.0]]]])]
    b = [jnp.array([[[[1.0, 0.0], [0.0, 7.0]]]])]
    np.testing.assert_allclose(feature_distance(a, b), [0.4], rtol=1e-6)
    weights = [jnp.array([2.0, 0.5])]
    np.testing.assert_allclose(feature_distance(a, b, weights), [0.32], rtol=1e-6)
    np.testing.assert_allclose(feature_distance(a * 3, b * 3), [1.2], rtol=1e-6)


def test_gradient_is_finite_where_all_channels_are_zero():
    zero, other = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
    gradient = jax.grad(lambda x: feature_distance([x], [other]).sum())(zero)
    assert np.isfinite(gradient).all()


def test_bad_files_and_images_are_named(files):
    vgg, lin = files
    missing = {name: x for name, x in vgg.items() if name != "features.28.bias"}
    negative = lin | {"lin2.model.1.weight": -lin["lin2.model.1.weight"]}
    wrong = vgg | {"features.0.bias": np.zeros(3)}
    cases = [
        ((missing, lin), r"1 names missing \['features.28.bias'\]"),
        ((vgg | {"features.30.weight": np.zeros(1)}, lin), "features.30.weight"),
        ((vgg, negative), "lin2.model.1.weight is negative"),
        ((wrong, lin), r"features.0.bias has shape \(3,\)"),
    ]
    for arguments, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            import_lpips(*arguments)
    with pytest.raises(InputError, match="expected equal"):
        feature_distance([jnp.zeros((1, 2, 2, 3))], [jnp.zeros((1, 2, 2, 4))])
    with pytest.raises(InputError, match=r"expected \[c\]"):
        feature_distance(
            [jnp.zeros((1, 2, 2, 3))] * 2, [jnp.zeros((1, 2, 2, 3))] * 2, [jnp.ones(3)]
        )
    model = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=">=16"):
        model(jnp.zeros((1, 15, 16, 3)), jnp.zeros((1, 15, 16, 3)))
