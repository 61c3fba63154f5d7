"""The real base: Wan2.1's weights in both layouts, and parity with diffusers' model of them."""
import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model as M

SMALL = dict(dim=64, layers=2, heads=2, ffn=96, text_dim=40, prompt_len=12, learned=False)
TOLERANCE = 1e-4        # of the output's standard deviation; the smallest of the mistakes below moves it by 5e-4


def reference(channels=16):
    """diffusers' WanTransformer3DModel with every parameter random, tables and biases too; the time in float64."""
    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=SMALL["heads"], attention_head_dim=SMALL["dim"] // SMALL["heads"], in_channels=channels,
        out_channels=16, text_dim=SMALL["text_dim"], ffn_dim=SMALL["ffn"], num_layers=SMALL["layers"])
    for name, p in net.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 and "table" not in name else 2))
            p.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    net.condition_embedder.timesteps_proj.forward = exact_time      # theirs is float32: 2e-5 off at t = 1000
    return net.eval()


def exact_time(t):
    """diffusers' sinusoid for flip_sin_to_cos, no shift of frequencies, in float64 and one by one."""
    rows = [[f(x * math.exp(-math.log(10000) * i / 128)) for f in (math.cos, math.sin) for i in range(128)]
            for x in t.double().tolist()]
    return torch.tensor(rows)


def test_time_is_embedded_in_float64():
    t = torch.tensor([0.0, 1.0, 437.0, 999.7])
    assert (M.sinusoid(t) - exact_time(t)).abs().max() < 1e-6           # in float32: 1e-5 and more
    theirs = diffusers.models.embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (theirs(t) - exact_time(t)).abs().max() < 2e-4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(diffusers' model, ours with the weights that it saved, in several shards)."""
    ref, folder = reference(), tmp_path_factory.mktemp("wan")
    ref.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    net = M.DiT(**SMALL)
    M.load_wan(net, folder)
    return ref, net.eval()


def inputs(shape, t, words=12):
    torch.manual_seed(1)
    z, z_lr = torch.randn(2, 2, 16, *shape)
    text = torch.randn(2, 12, SMALL["text_dim"])
    text[:, words:] = 0                                             # a short prompt is padded with zeros first
    return z, torch.full((2,), t / 1000), z_lr, text


def difference(ref, net, z, t, z_lr, text, ours=None):
    want = ref(z, 1000 * t, text, return_dict=False)[0]
    return ((net(z, t, z_lr, text if ours is None else ours) - want).abs().max() / want.std()).item()


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 6, 8), (2, 10, 4)])
@pytest.mark.parametrize("t, words", [(0, 12), (1, 3), (437, 1), (1000, 12)])
def test_outputs_are_those_of_diffusers(pair, shape, t, words):
    with torch.no_grad():
        assert difference(*pair, *inputs(shape, t, words)) < TOLERANCE


@pytest.mark.parametrize("shape, t, words", [((3, 4, 6), 700, 12), ((1, 6, 4), 0, 2), ((2, 4, 8), 1000, 5)])
def test_gradients_are_those_of_diffusers(pair, shape, t, words):
    ref, net = pair
    z, t, z_lr, text = inputs(shape, t, words)
    weight, grads = torch.randn_like(z), []
    for model, at, rest in ((ref, 1000 * t, (text,)), (net, t, (z_lr, text))):
        model.zero_grad()
        x = z.clone().requires_grad_(True)
        out = model(x, at, *rest)
        ((out if model is net else out.sample) * weight).sum().backward()
        grads.append(x.grad)
    assert (grads[1] - grads[0]).norm() <= 2e-4 * grads[0].norm()
    ours = dict(net.named_parameters())
    for name, p in ref.named_parameters():
        grad = ours[M.wan_name(name)].grad
        grad = grad[:, :16] if name == "patch_embedding.weight" else grad
        assert (grad - p.grad).norm() <= 2e-4 * p.grad.norm() + 1e-6, name
    assert ours["patch_embedding.weight"].grad[:, 16:].norm() > 0   # zeros that learn


def test_a_wide_checkpoint_uses_the_lr(tmp_path):
    ref = reference(channels=32)
    ref.save_pretrained(tmp_path)
    net = M.DiT(**SMALL)
    M.load_wan(net, tmp_path)
    z, t, z_lr, text = inputs((2, 4, 4), 500)
    with torch.no_grad():
        want = ref(torch.cat([z, z_lr], 1), 1000 * t, text, return_dict=False)[0]
        assert ((net(z, t, z_lr, text) - want).abs().max() / want.std()) < TOLERANCE


def test_the_original_layout_loads(pair, tmp_path):
    state = {k: v for k, v in pair[1].state_dict().items() if k != "prompts"}
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].contiguous()
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + k: v for k, v in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
        net = M.DiT(**SMALL)
        M.load_wan(net, tmp_path / "diffusion_pytorch_model.safetensors")
        for key, x in pair[1].state_dict().items():
            assert key == "prompts" or torch.equal(x, net.state_dict()[key]), key


def public_shapes():
    """{name in Wan-AI/Wan2.1-T2V-1.3B's own file: shape}, written out from that file, not from our network."""
    D, ffn = 1536, 8960
    linear = {"text_embedding.0": (D, 4096), "text_embedding.2": (D, D), "time_embedding.0": (D, 256),
              "time_embedding.2": (D, D), "time_projection.1": (6 * D, D), "head.head": (64, D)}
    plain = {"head.modulation": (1, 2, D)}
    for i in range(30):
        at = f"blocks.{i}."
        linear |= {f"{at}{a}_attn.{x}": (D, D) for a in ("self", "cross") for x in "qkvo"}
        linear |= {f"{at}ffn.0": (ffn, D), f"{at}ffn.2": (D, ffn)}
        plain |= {f"{at}{a}_attn.norm_{x}.weight": (D,) for a in ("self", "cross") for x in "qk"}
        plain |= {f"{at}norm3.weight": (D,), f"{at}norm3.bias": (D,), f"{at}modulation": (1, 6, D)}
    plain |= {"patch_embedding.weight": (D, 16, 1, 2, 2), "patch_embedding.bias": (D,)}
    return plain | {f"{k}.weight": x for k, x in linear.items()} | {f"{k}.bias": x[:1] for k, x in linear.items()}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_all_825_tensors_load_at_the_real_size(monkeypatch, layout):
    with torch.device("meta"):
        net = M.build("wan1.3b")
        theirs = diffusers.WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, num_layers=30,
                                                 ffn_dim=8960).state_dict()
        shapes = public_shapes() if layout == "original" else {k: tuple(x.shape) for k, x in theirs.items()}
        tensors = {k: torch.empty(shape) for k, shape in shapes.items()}
        assert len(tensors) == 825
        monkeypatch.setattr(M, "read_tensors", lambda path, part: dict(tensors))
        M.load_wan(net, "wan")                                          # strict: raises for any other name or shape
        with pytest.raises(SystemExit, match="missing: blocks.7"):
            del tensors[next(k for k in tensors if k.startswith("blocks.7."))]
            M.load_wan(net, "wan")
    # what no shape of a weight tells
    assert net.blocks[0].self_attn.heads == 12 and net.rope == 10000 and net.residual is None


def test_other_files_are_refused(pair, tmp_path):
    state = {k: v.clone() for k, v in pair[1].state_dict().items() if k != "prompts"}
    file = tmp_path / "w.safetensors"

    def refused(words, tensors=None, path=file):
        if tensors is not None:
            save_file(tensors, file)
        with pytest.raises(SystemExit, match=words) as stop:
            M.load_wan(M.DiT(**SMALL), path)
        assert "\n" not in stop.value.code
    refused(r"missing: blocks.1.ffn.0.bias and 0 more", {k: v for k, v in state.items() if k != "blocks.1.ffn.0.bias"})
    refused(r"unexpected: img_emb and 0 more", state | {"img_emb": torch.zeros(1)})
    refused(r"another shape: head.head.bias", state | {"head.head.bias": torch.zeros(7)})
    refused("no weights there", path=tmp_path / "none")
    file.write_bytes(b"not a file of weights")
    refused("not readable")


# ---------------------------------------------------------------------------- mistakes that parity must catch


def erf_gelu(net, patch):
    for module in net.modules():
        if isinstance(module, torch.nn.GELU):
            patch.setattr(module, "approximate", "none")


def norm_per_head(net, patch):
    def forward(self, x):
        heads = x.unflatten(-1, (SMALL["heads"], -1))
        return F.rms_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2) * self.weight
    patch.setattr(M.RMSNorm, "forward", forward)


def one_spectrum(net, patch):
    def cut(T, H, W, K, base, device):
        theta = base ** (-torch.arange(0, K, 2).double() / K)
        at = torch.cartesian_prod(*(torch.arange(n).double() for n in (T, H, W)))
        widths = [K // 2 - 2 * (K // 6), K // 6, K // 6]
        angle = at.repeat_interleave(torch.tensor(widths), dim=1) * theta
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    patch.setattr(M, "rope_table", cut)


def rotate_half(net, patch):
    def rotate(x, table):
        a, b = x.float().chunk(2, dim=-1)
        pairs = torch.complex(a.contiguous(), b.contiguous()) * table[:, None]
        return torch.cat([pairs.real, pairs.imag], dim=-1)
    patch.setattr(M, "rotate", rotate)


def rope_hw_swapped(net, patch):
    table = M.rope_table

    def swapped(T, H, W, K, base, device):
        t, hw = table(T, H, W, K, base, device).tensor_split([K // 2 - 2 * (K // 6)], dim=1)
        return torch.cat([t, hw.roll(K // 6, dims=1)], dim=1)
    patch.setattr(M, "rope_table", swapped)


def norms_swapped(net, patch):
    for block in net.blocks:
        affine, plain = block.norm3, block.norm2
        patch.setitem(block._modules, "norm2", affine)
        patch.setitem(block._modules, "norm3", plain)


def tanh_gates(net, patch):
    plain = torch.addcmul
    patch.setattr(torch, "addcmul", lambda a, b, c: plain(a, b.tanh() if a.shape[1] > 1 else b, c))


def head_on_e0(net, patch):
    def forward(self, x, e):
        e0 = net.time_projection(e).unflatten(1, (6, -1))
        shift, scale = (self.modulation + e0[:, :2]).chunk(2, dim=1)
        return self.head(M.modulate(self.norm(x), shift, scale))
    patch.setattr(M.Head, "forward", forward)


def channel_first(net, patch):
    plain = M.rearrange
    patch.setattr(M, "rearrange", lambda x, pattern, **n: plain(x, pattern.replace("(p q C)", "(C p q)"), **n))


@pytest.mark.parametrize("mistake", [erf_gelu, norm_per_head, one_spectrum, rotate_half, rope_hw_swapped,
                                     norms_swapped, tanh_gates, head_on_e0, channel_first])
def test_parity_catches(pair, mistake, monkeypatch):
    ref, net = pair
    mistake(net, monkeypatch)
    with torch.no_grad():
        assert difference(ref, net, *inputs((3, 6, 8), 437)) > 3 * TOLERANCE


def test_parity_catches_text_without_its_padding(pair):
    """Padding rows become a constant vector that is attended to; leaving them out is the same as masking them."""
    z, t, z_lr, text = inputs((3, 6, 8), 437, words=5)
    with torch.no_grad():
        assert difference(*pair, z, t, z_lr, text) < TOLERANCE
        assert difference(*pair, z, t, z_lr, text, ours=text[:, :5]) > 100 * TOLERANCE
