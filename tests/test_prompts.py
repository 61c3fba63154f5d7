"""data.py prompts: the tensors of a text encoder for model.read_prompts, with a tiny random one."""
import os
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import data
import model as M


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Folder of a pipeline with a random UMT5 encoder, and a tokenizer of a few words, in Wan's layout."""
    words = ["<pad>", "</s>", "<unk>", *"a sharp video , blurred".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("pipeline")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>") \
        .save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    encoder.save_pretrained(folder / "text_encoder")
    return folder, encoder.eval()


def direct(encoder, ids):
    """As Wan does it: padded to 512, padding masked, and zeros in its place afterwards."""
    mask = (torch.arange(512) < len(ids)).long()[None]
    padded = torch.tensor(ids + [0] * (512 - len(ids)))[None]
    with torch.no_grad():
        return encoder(padded, attention_mask=mask).last_hidden_state[0] * mask[0, :, None]


def test_prompts_are_the_outputs_of_the_encoder_and_zeros(text_model, tmp_path):
    folder, encoder = text_model
    out = tmp_path / "prompts.safetensors"
    data.main(["prompts", "--encoder", str(folder), "--out", str(out), "--positive", " a  sharp\nvideo,",
               "--negative", "blurred " * 700])
    prompts = M.read_prompts(out, (3, 512, 16))
    assert prompts.shape == (3, 512, 16) and prompts.dtype == torch.float32
    for row, ids in ((M.NULL, [1]), (M.POSITIVE, [3, 4, 5, 6, 1]), (M.NEGATIVE, [7] * 511 + [1])):
        want = direct(encoder, ids)
        assert (prompts[row] - want).abs().max() < 0.03 * want.abs().max()      # bf16
        assert not prompts[row, len(ids):].any() and prompts[row, :len(ids)].any(1).all()
    with safe_open(out, "pt") as f:
        assert f.metadata() == {"null": "", "positive": " a  sharp\nvideo,", "negative": "blurred " * 700}
        assert f.get_tensor("prompts").dtype == torch.bfloat16


def test_prompts_do_not_depend_on_padding(text_model):
    folder, encoder = text_model
    found = data.embed(["", "a video"], AutoTokenizer.from_pretrained(folder / "tokenizer"), encoder, 512)
    torch.testing.assert_close(found, torch.stack([direct(encoder, [1]), direct(encoder, [3, 5, 1])]))


def test_prompts_refuse_in_one_line(text_model, tmp_path, monkeypatch):
    folder, _ = text_model

    def refused(words, function, *args):
        with pytest.raises(SystemExit, match=words) as stop:
            function(*args)
        assert "\n" not in stop.value.code
    refused("no UMT5 encoder with its tokenizer", data.write_prompts, str(tmp_path), tmp_path / "p.safetensors")
    for out in (tmp_path / "none" / "p.safetensors", tmp_path):
        refused("name a file in a folder that exists", data.write_prompts, str(folder), out)
    data.write_prompts(str(folder), tmp_path / "p.safetensors")
    refused(r"prompts \(3, 512, 16\), the model wants \(3, 512, 4096\)", M.read_prompts, tmp_path / "p.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused("no prompts, the model wants", M.read_prompts, tmp_path / "x.safetensors")
    refused("no weights there", M.read_prompts, tmp_path / "none.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "text_encoder" / "model.safetensors")
    save_file({k: x for k, x in weights.items() if not k.endswith("wi_0.weight")},
              broken / "text_encoder" / "model.safetensors", {"format": "pt"})
    refused("missing: encoder.block.0.layer.1.DenseReluDense.wi_0.weight and 0 more", data.write_prompts, str(broken),
            tmp_path / "p.safetensors")
    os.truncate(broken / "text_encoder" / "model.safetensors", 1000)
    refused("no UMT5 encoder with its tokenizer", data.write_prompts, str(broken), tmp_path / "p.safetensors")
    shutil.rmtree(broken / "tokenizer")
    refused("no tokenizer/; download", data.write_prompts, str(broken), tmp_path / "p.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("pip install -r requirements-wan.txt", data.write_prompts, str(folder), tmp_path / "p.safetensors")


def test_prompts_of_the_real_base_have_the_size_of_its_network():
    with torch.device("meta"):
        assert M.build("wan1.3b").prompts.shape == (3, 512, 4096)
