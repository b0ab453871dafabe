"""The FID network against a NumPy forward pass written from the checkpoint's names, in NCHW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from numpy.lib.stride_tricks import sliding_window_view

from jaxllm.errors import InputError
from jaxllm.models.inception import InceptionV3, import_inception, network_input, torch_names


def pool(x, reduce, stride=1, pad=0, fill=-np.inf):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return reduce(sliding_window_view(x, (3, 3), (2, 3))[:, :, ::stride, ::stride], (4, 5))


class NumpyInception:
    """Random weights are drawn as a layer first needs them, so names and shapes are its own."""

    def __init__(self, seed):
        self.rng, self.tensors = np.random.default_rng(seed), {}

    def conv(self, name, x, out, kernel=(1, 1), stride=1, pad=(0, 0)):
        fan_in = x.shape[1] * kernel[0] * kernel[1]
        shape = (out, x.shape[1], *kernel)
        w = self.rng.standard_normal(shape, np.float32) * (2 / fan_in) ** 0.5
        scale, var = self.rng.uniform(0.5, 1.5, (2, out)).astype(np.float32)
        bias, mean = self.rng.normal(0, 0.2, (2, out)).astype(np.float32)
        self.tensors |= {f"{name}.conv.weight": w, f"{name}.bn.weight": scale}
        self.tensors |= {f"{name}.bn.bias": bias, f"{name}.bn.running_mean": mean}
        self.tensors |= {f"{name}.bn.running_var": var}
        padded = np.pad(x, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
        windows = sliding_window_view(padded, kernel, (2, 3))[:, :, ::stride, ::stride]
        y = np.tensordot(windows, w, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
        scale, var, bias, mean = (v[:, None, None] for v in (scale, var, bias, mean))
        return np.maximum((y - mean) / np.sqrt(var + 0.001) * scale + bias, 0)

    def chain(self, name, x, *layers):
        for suffix, out, kernel in layers:
            pad = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
            x = self.conv(f"{name}.{suffix}", x, out, kernel, pad=pad)
        return x

    def mean_pool(self, x):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        return np.nanmean(sliding_window_view(padded, (3, 3), (2, 3)), (4, 5))

    def block_a(self, name, x, pool_features):
        one, three, five = (1, 1), (3, 3), (5, 5)
        branches = [
            self.chain(name, x, ("branch1x1", 64, one)),
            self.chain(name, x, ("branch5x5_1", 48, one), ("branch5x5_2", 64, five)),
            self.chain(
                *(name, x, ("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three)),
                ("branch3x3dbl_3", 96, three),
            ),
            self.chain(name, self.mean_pool(x), ("branch_pool", pool_features, one)),
        ]
        return np.concatenate(branches, 1)

    def block_c(self, name, x, c):
        row, column = (1, 7), (7, 1)
        double = [(c, (1, 1)), (c, column), (c, row), (c, column), (192, row)]
        branches = [
            self.chain(name, x, ("branch1x1", 192, (1, 1))),
            self.chain(
                *(name, x, ("branch7x7_1", c, (1, 1)), ("branch7x7_2", c, row)),
                ("branch7x7_3", 192, column),
            ),
            self.chain(
                name, x, *((f"branch7x7dbl_{i + 1}", *layer) for i, layer in enumerate(double))
            ),
            self.chain(name, self.mean_pool(x), ("branch_pool", 192, (1, 1))),
        ]
        return np.concatenate(branches, 1)

    def block_e(self, name, x, pooled):
        a = self.chain(name, x, ("branch3x3_1", 384, (1, 1)))
        b = self.chain(name, x, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
        branches = [
            self.chain(name, x, ("branch1x1", 320, (1, 1))),
            self.chain(name, a, ("branch3x3_2a", 384, (1, 3))),
            self.chain(name, a, ("branch3x3_2b", 384, (3, 1))),
            self.chain(name, b, ("branch3x3dbl_3a", 384, (1, 3))),
            self.chain(name, b, ("branch3x3dbl_3b", 384, (3, 1))),
            self.chain(name, pooled, ("branch_pool", 192, (1, 1))),
        ]
        return np.concatenate(branches, 1)

    def forward(self, x):
        x = self.conv("Conv2d_1a_3x3", 2 * x - 1, 32, (3, 3), 2)
        x = self.conv("Conv2d_2a_3x3", x, 32, (3, 3))
        x = pool(self.conv("Conv2d_2b_3x3", x, 64, (3, 3), pad=(1, 1)), np.max, 2)
        x = self.conv("Conv2d_3b_1x1", x, 80)
        x = pool(self.conv("Conv2d_4a_3x3", x, 192, (3, 3)), np.max, 2)
        for name, channels in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.block_a(name, x, channels)
        y = self.chain(
            "Mixed_6a", x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3))
        )
        a = self.conv("Mixed_6a.branch3x3", x, 384, (3, 3), 2)
        b = self.conv("Mixed_6a.branch3x3dbl_3", y, 96, (3, 3), 2)
        x = np.concatenate([a, b, pool(x, np.max, 2)], 1)
        for name, channels in zip("bcde", (128, 160, 160, 192), strict=True):
            x = self.block_c(f"Mixed_6{name}", x, channels)
            if name == "d":
                spatial = x[:, :7]
        y = self.chain("Mixed_7a", x, ("branch3x3_1", 192, (1, 1)))
        a = self.conv("Mixed_7a.branch3x3_2", y, 320, (3, 3), 2)
        layers = [("branch7x7x3_1", (1, 1)), ("branch7x7x3_2", (1, 7)), ("branch7x7x3_3", (7, 1))]
        y = self.chain("Mixed_7a", x, *((layer, 192, kernel) for layer, kernel in layers))
        b = self.conv("Mixed_7a.branch7x7x3_4", y, 192, (3, 3), 2)
        x = np.concatenate([a, b, pool(x, np.max, 2)], 1)
        x = self.block_e("Mixed_7b", x, self.mean_pool(x))
        x = self.block_e("Mixed_7c", x, pool(x, np.max, pad=1)).mean((2, 3))
        w = self.rng.standard_normal((1008, 2048), np.float32) * 0.02
        self.tensors |= {"fc.weight": w, "fc.bias": np.linspace(-1, 1, 1008, dtype=np.float32)}
        return spatial, x, x @ w.T


@pytest.fixture(scope="module")
def reference():
    network = NumpyInception(0)
    # 107 pixels leave 11, 5 and 2 positions a side for the blocks, so that all see their padding.
    images = np.random.default_rng(1).uniform(0, 1, (2, 3, 107, 107)).astype(np.float32)
    return network.tensors, images, network.forward(images)


def test_imported_network_matches_numpy(reference):
    tensors, images, (spatial, pooled, logits) = reference
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.array(7)}
    graphdef, state = nnx.split(import_inception(tensors | counters))

    @jax.jit
    def run(state, images):
        model = nnx.merge(graphdef, state)
        features = model.features(images, resize=False)
        pool = features.pool
        return features, model.logits(pool), model.probabilities(pool)

    got, got_logits, probabilities = run(state, jnp.asarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(got.pool, pooled, rtol=1e-3, atol=1e-4 * pooled.max())
    got_spatial = got.spatial.reshape(2, 5, 5, 7)
    np.testing.assert_allclose(
        got_spatial, spatial.transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4 * spatial.max()
    )
    biased = logits + tensors["fc.bias"]
    np.testing.assert_allclose(got_logits, biased, atol=1e-4 * np.abs(biased).max())
    # Probabilities leave the output bias out, as the published scores do.
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_names_are_exactly_those_of_the_checkpoint(reference):
    assert torch_names().keys() == reference[0].keys()
    assert len(set(torch_names().values())) == len(reference[0]) == 94 * 5 + 2


def test_parameters_and_shapes_at_full_size():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))
    sizes: dict[bool, int] = {True: 0, False: 0}
    for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items():
        sizes[path[-1] in ("mean", "var")] += leaf.size
    # torchvision documents 27,161,264 with 1000 classes and the auxiliary head, which has 98,560 +
    # 2,459,136 + 769,000; the FID network has 8 more classes of 2,048 weights and a bias each.
    assert sizes[False] == 27_161_264 - 98_560 - 2_459_136 - 769_000 + 8 * 2049
    # Keras documents 34,432 non-trainable values, the running statistics.
    assert sizes[True] == 34_432

    def run(state, images):
        model = nnx.merge(graphdef, state)
        features = model.features(images)
        return features, model.probabilities(features.pool)

    images = jax.ShapeDtypeStruct((4, 32, 48, 3), jnp.float32)
    features, probabilities = jax.eval_shape(run, state, images)
    assert features.pool.shape == (4, 2048) and features.spatial.shape == (4, 17 * 17 * 7)
    assert probabilities.shape == (4, 1008)


def test_resize_is_bilinear_between_pixel_centres():
    images = np.random.default_rng(0).uniform(0, 1, (1, 5, 400, 3)).astype(np.float32)

    def weights(size):
        matrix = np.zeros((299, size))
        for i in range(299):
            at = np.clip((i + 0.5) * size / 299 - 0.5, 0, size - 1)
            low = min(int(at), size - 2)
            matrix[i, low], matrix[i, low + 1] = 1 - (at - low), at - low
        return matrix

    resized = np.einsum("ih,bhwc,jw->bijc", weights(5), images, weights(400))
    # Positions up to 400 carry 2 float32 roundings of 400 * 2^-24; neighbours differ by up to 2.
    np.testing.assert_allclose(network_input(jnp.asarray(images)), 2 * resized - 1, atol=1e-4)


def test_bad_weights_and_images_are_named(reference):
    tensors = reference[0]
    name = "Mixed_7c.branch3x3_2a.conv.weight"
    cases = [
        ({k: v for k, v in tensors.items() if k != name}, r"1 names missing \['Mixed_7c"),
        (tensors | {"AuxLogits.fc.bias": np.zeros(1000)}, "AuxLogits.fc.bias"),
        (tensors | {"fc.weight": np.zeros((1000, 2048))}, r"fc.weight has shape \(1000, 2048\)"),
    ]
    for bad, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            import_inception(bad)
    with pytest.raises(InputError, match=">= 75"):
        network_input(jnp.zeros((1, 74, 80, 3)), resize=False)
    with pytest.raises(InputError, match=r"\[B, h, w, 3\]"):
        network_input(jnp.zeros((1, 3, 74, 80)))
