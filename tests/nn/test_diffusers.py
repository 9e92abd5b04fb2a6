"""Models exchanged with diffusers: weights to the bit, outputs and gradients to rounding."""

import copy
import sys

import pytest
import torch

from flowkernels.nn import MMDiT, MMDiTConfig, diffusers_weights
from tests.nn.plain import CLASS_CONFIG, FLUX_CONFIG

diffusers = pytest.importorskip("diffusers")

SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
VARIANTS = {
    "sd3": SD3,
    "sd35": {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd35_dual_last": {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (1, 2)},
    "sd3_one_block": {**SD3, "num_layers": 1},
    "flux": FLUX,
    "flux_guidance": {**FLUX, "guidance_embeds": True},
}


def is_flux(entries):
    return "num_single_layers" in entries


def make(entries, seed=0):
    """A random model; norms' weights too, which start as ones."""
    torch.manual_seed(seed)
    name = "FluxTransformer2DModel" if is_flux(entries) else "SD3Transformer2DModel"
    model = getattr(diffusers, name)(**entries)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def inputs(entries, rows=2, size=(8, 6), text=5):
    torch.manual_seed(1)
    channels = entries["in_channels"] // (4 if is_flux(entries) else 1)
    conditions = {
        "text": torch.randn(rows, text, entries["joint_attention_dim"]),
        "pooled": torch.randn(rows, entries["pooled_projection_dim"]),
    }
    if entries.get("guidance_embeds"):
        conditions["guidance"] = torch.tensor([3.5, 1.0, 7.0, 2.0, 5.0])[:rows]
    return torch.randn(rows, channels, *size), torch.rand(rows), conditions


def forward(model, x, t, text, pooled, guidance=None):
    """diffusers' forward for our arguments, with its pipelines' packing and ids."""
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(x, text, pooled, 1000 * t, return_dict=False)[0]
    pipeline = diffusers.FluxPipeline
    B, C, H, W = x.shape
    out = model(
        pipeline._pack_latents(x, B, C, H, W),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=pipeline._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(out, H * 8, W * 8, 8)


def worst(mine, expected):
    """Largest difference over the largest expected entry."""
    return ((mine - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("entries", VARIANTS.values(), ids=VARIANTS)
def test_output_equals_diffusers(entries, rows):
    model = make(entries)
    x, t, conditions = inputs(entries, rows)
    with torch.no_grad():
        expected = forward(model, x, t, **conditions)
        mine = MMDiT.from_diffusers(model)(x, t, **conditions)
    assert mine.shape == expected.shape
    assert expected.abs().max() > 0.1  # there is something to compare
    # float32 rounding through three blocks in another order
    assert worst(mine, expected) < 1e-5


@pytest.mark.parametrize("entries", VARIANTS.values(), ids=VARIANTS)
def test_gradients_equal_diffusers(entries):
    """Of every weight: diffusers' gradients, renamed and joined as weights are, against ours."""
    model = make(entries)
    mine = MMDiT.from_diffusers(model)
    x, t, conditions = inputs(entries)
    weight = torch.randn(x.shape)
    (forward(model, x, t, **conditions) * weight).sum().backward()
    (mine(x, t, **conditions) * weight).sum().backward()
    gradients = copy.deepcopy(model)
    for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
        # diffusers computes the last context's queries and drops them: no gradient.
        grad = torch.zeros_like(source) if source.grad is None else source.grad
        parameter.data.copy_(grad)
    expected = diffusers_weights.read(gradients)[1]
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for name, parameter in mine.named_parameters():
        # float32 sums in another order; some gradients are sums that cancel (a key's bias moves
        # all scores alike), so errors are of the size of the others' rounding.
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6 * largest.item(), msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_is_exact(entries, dtype):
    model = make(entries).to(dtype).eval()
    mine = MMDiT.from_diffusers(model)
    back = mine.to_diffusers()
    assert type(back) is type(model)
    assert not mine.training
    assert not back.training
    before, after = model.state_dict(), back.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
        assert after[name].data_ptr() != tensor.data_ptr()
    for name, value in model.config.items():
        if not name.startswith("_") and value is not None:
            assert back.config[name] == value, name
    # What was read is a network like any other: its configuration rebuilds it.
    rebuilt = MMDiT(MMDiTConfig.from_dict(mine.config.to_dict()))
    rebuilt.load_state_dict(mine.state_dict())
    assert all(not tensor.is_meta for tensor in [*mine.parameters(), *mine.buffers()])


def test_shares_no_memory_and_survives_saving(tmp_path):
    model = make(VARIANTS["sd35"])
    mine = MMDiT.from_diffusers(model)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, model.parameters(), make(VARIANTS["sd35"]).parameters()))
    mine.to_diffusers().save_pretrained(tmp_path)
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    again = MMDiT.from_diffusers(loaded)
    assert all(map(torch.equal, again.state_dict().values(), mine.state_dict().values()))


def test_padded_text_equals_diffusers_without_the_padding():
    for entries in (VARIANTS["sd35"], VARIANTS["flux"]):
        model = make(entries)
        x, t, conditions = inputs(entries, text=7)
        lengths = torch.tensor([7, 3])
        with torch.no_grad():
            mine = MMDiT.from_diffusers(model)(x, t, text_lengths=lengths, **conditions)
            for row, length in enumerate(lengths):
                one = {k: v[row : row + 1] for k, v in conditions.items()}
                one["text"] = one["text"][:, :length]
                expected = forward(model, x[row : row + 1], t[row : row + 1], **one)
                assert worst(mine[row : row + 1], expected) < 1e-5


def test_bfloat16_is_as_near_to_float32_as_diffusers():
    """At most twice as far as diffusers in bfloat16; roundings differ, so not the same."""
    for entries in (VARIANTS["sd35"], VARIANTS["flux_guidance"]):
        model = make(entries)
        x, t, conditions = inputs(entries, rows=5)
        narrow = copy.deepcopy(model).bfloat16()
        # Times stay float32: SD3's is no input in bfloat16, FLUX's would be rounded by diffusers.
        t = t.bfloat16().float()
        low = {k: v.bfloat16() for k, v in conditions.items()}
        if "guidance" in low:
            low["guidance"] = conditions["guidance"]
        with torch.no_grad():
            exact = forward(model, x, t, **conditions)
            theirs = forward(narrow, x.bfloat16(), t, **low)
            mine = MMDiT.from_diffusers(narrow)(x.bfloat16(), t, **low)
        assert mine.dtype == torch.bfloat16
        assert worst(mine.float(), exact) <= 2 * worst(theirs.float(), exact) + 2**-9


def test_a_model_of_ours_goes_to_diffusers():
    """Without queries in the last context: zeros stand for them, and the output is the same."""
    config = MMDiTConfig(
        image_size=8,
        in_channels=4,
        dim=32,
        depth=2,
        heads=2,
        text_dim=24,
        pooled_dim=20,
        qk_norm=True,
        positions="learned",
        position_side=12,
    )
    torch.manual_seed(0)
    mine = MMDiT(config)
    for parameter in mine.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = mine.to_diffusers()
    x, t, conditions = inputs(SD3)
    with torch.no_grad():
        assert worst(mine(x, t, **conditions), forward(model, x, t, **conditions)) < 1e-5
    assert not model.transformer_blocks[1].attn.add_q_proj.weight.any()
    back = MMDiT.from_diffusers(model)
    assert back.config.positions == "cropped"
    for name, tensor in mine.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_fresh_tables_of_positions_are_those_of_diffusers():
    config = MMDiTConfig(image_size=8, dim=32, heads=2, positions="cropped", position_side=12)
    table = MMDiT(config).patch_embedding.positions
    expected = make(SD3).pos_embed.pos_embed[0]
    # diffusers rounds the coordinates to float32 before it takes the sine
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_gradient_checkpointing_goes_along():
    model = make(FLUX)
    model.enable_gradient_checkpointing()
    mine = MMDiT.from_diffusers(model)
    assert mine.config.gradient_checkpointing
    assert mine.to_diffusers().gradient_checkpointing


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({**SD3, "out_channels": 8}, "out_channels is 8"),
        ({**SD3, "qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({**SD3, "pos_embed_max_size": None}, "pos_embed_max_size is None"),
        ({**SD3, "sample_size": 9}, "sample_size is 9"),
        ({**SD3, "caption_projection_dim": 48}, "caption_projection_dim is 48"),
        ({**FLUX, "num_single_layers": 0}, "num_single_layers is 0"),
        ({**FLUX, "num_layers": 0}, "num_layers is 0"),
        ({**FLUX, "in_channels": 6}, "in_channels is 6"),
        ({**FLUX, "patch_size": 2}, "patch_size is 2"),
        ({**FLUX, "axes_dims_rope": (8, 8)}, "axes_dims_rope is"),
    ],
)
def test_unsupported_configurations_are_named(entries, message):
    with pytest.raises(ValueError, match=message):
        MMDiT.from_diffusers(make(entries))


def test_unknown_configuration_and_weights_are_named():
    model = make(SD3)
    model.register_to_config(register_tokens=4)
    with pytest.raises(ValueError, match="register_tokens"):
        MMDiT.from_diffusers(model)
    model = make(SD3)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"no place for.*to_added_qkv"):
        MMDiT.from_diffusers(model)
    model = make(FLUX)
    del model.transformer_blocks[0].attn.norm_added_q
    with pytest.raises(ValueError, match=r"no weight transformer_blocks\.0\.attn\.norm_added_q"):
        MMDiT.from_diffusers(model)
    model = make(FLUX)
    model.transformer_blocks[0].attn.to_k.bfloat16()
    with pytest.raises(ValueError, match=r"attn\.to_k\.weight.* have dtypes"):
        MMDiT.from_diffusers(model)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = make(FLUX)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"no weight .*to_q\.weight"):
        MMDiT.from_diffusers(model)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="model is a Linear"):
        MMDiT.from_diffusers(torch.nn.Linear(2, 2))

    class Changed(diffusers.SD3Transformer2DModel):
        pass

    with pytest.raises(TypeError, match="model is a Changed"):
        MMDiT.from_diffusers(Changed(**SD3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5, "text_dim": None, "pooled_dim": None}, "num_classes is 5"),
        ({"frequency_dim": 32}, "frequency_dim is 32"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio is 2\.0"),
        ({"pooled_dim": None}, "pooled_dim is None"),
        ({"single_depth": 0}, "single_depth is 0"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"patch_size": 1}, "patch_size is 1"),
        ({"rope_theta": 100.0}, r"rope_theta is 100\.0"),
        ({"dual_attention": (0,)}, r"dual_attention is \(0,\)"),
        ({"positions": "sincos"}, "positions is 'sincos'"),
        ({"positions": "cropped"}, r"image_size is \(4, 6\)"),
        ({"positions": "cropped", "image_size": 4}, "single_depth is 2"),
        ({"positions": "cropped", "image_size": 4, "single_depth": 0}, "guidance_embed is True"),
    ],
)
def test_what_diffusers_cannot_say_is_named(changes, message):
    flux = {**FLUX_CONFIG.to_dict(), "frequency_dim": 256}
    model = MMDiT(MMDiTConfig.from_dict({**flux, **changes}))
    with pytest.raises(ValueError, match=message):
        model.to_diffusers()


def test_without_diffusers_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install 'flowkernels\\[diffusers\\]'"):
        MMDiT(CLASS_CONFIG).to_diffusers()
