"""`python -m bert.export`: a folder that transformers, ONNX Runtime and the hub take, and what it says of the run."""

import base64
import dataclasses
import http.server
import importlib.util
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, pipeline

from bert.config import Config, TaskConfig
from bert.export import main
from bert.exporting import onnx_file
from bert.exporting.model_card import throughput
from bert.model.batch import Batch
from bert.model.model import Model
from bert.run.inference import load_model
from bert.start_from import read_model, sizes_of
from bert.tasks.heads import add_label_head
from data.files import write_json
from data.tokenizer import write_tokenizer_files
from run_pretraining import main as train
from tests import ROOT, assert_help_teaches
from tests.bert.run.runs import LENGTH, MODEL, arguments, checkpoints, make_shards
from tests.bert.run.test_checkpoint import WORDS

LICENSE = ["--license", "apache-2.0"]
TEXT = "word3 [MASK] word7"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder above a small run's, its last checkpoint)."""
    folder = tmp_path_factory.mktemp("export")
    shards = make_shards(folder / "shards")
    held_out = ["--data.held_out_files", str(shards / "train-00001.h5"), "--data.files", str(shards / "train-00000.h5")]
    assert train([*arguments(folder, shards, training__max_steps=3), *held_out]) == 0
    return folder, checkpoints(folder)[-1]


@pytest.fixture(scope="module")
def exported(run):
    """An export of it with all that there is, but no upload."""
    folder, checkpoint = run
    words = ["--language", "tr", "--name", "Kuş", "--onnx"] if onnx_is_there() else []
    assert main([checkpoint, str(folder / "out"), *LICENSE, *words]) == 0
    return folder / "out"


def onnx_is_there():
    return all(map(importlib.util.find_spec, onnx_file.PACKAGES))


def inputs_of(length, rows=3, vocab=MODEL["vocab_size"]):
    """Random sequences of several lengths, as transformers takes them."""
    generator = torch.Generator()
    generator.seed()
    places, ends = torch.arange(length).expand(rows, -1), torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (places < ends).long()
    ids = torch.randint(vocab, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (places >= ends // 2).long() * mask}


def logits_of_project(folder, inputs):
    """MLM's at each token, and NSP's, by the project's graph."""
    model = load_model(str(folder), TaskConfig())
    positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    names = dict(inputs, position_ids=positions, sample_ids=inputs["attention_mask"])
    with torch.no_grad():
        hidden = model.encode(Batch.of_rows(names))
        mlm = model.cls.mlm_logits(hidden, positions).unflatten(0, positions.shape)
        return hidden, mlm, model.cls.nsp_logits(hidden, positions[:, :1])[:, 0]


def test_transformers_classes_give_the_logits_of_the_projects_graph(run, exported):
    inputs = inputs_of(LENGTH)
    inside = inputs["attention_mask"].bool()
    hidden, mlm, nsp = logits_of_project(run[1], inputs)
    with torch.no_grad():
        outputs = [
            kind.from_pretrained(exported)(**inputs) for kind in (AutoModel, BertForPreTraining, BertForMaskedLM)
        ]
    assert (outputs[0].last_hidden_state - hidden)[inside].abs().max() < 1e-5
    assert (outputs[1].prediction_logits - mlm)[inside].abs().max() < 1e-5
    assert (outputs[1].seq_relationship_logits - nsp).abs().max() < 1e-5
    assert (outputs[2].logits - mlm)[inside].abs().max() < 1e-5

    fill = pipeline("fill-mask", model=str(exported), top_k=3)
    row = {name: torch.tensor(ids)[None] for name, ids in fill.tokenizer(TEXT).items()}
    _, mlm, _ = logits_of_project(run[1], row)
    best = mlm[0, 2].softmax(-1).topk(3)
    found = fill(TEXT)
    assert [token["token"] for token in found] == best.indices.tolist()
    assert [token["score"] for token in found] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_onnx_runtime_gives_them_too_for_any_number_and_length(run, exported):
    for package in onnx_file.PACKAGES:
        pytest.importorskip(package)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [part.name for part in session.get_inputs()] == list(onnx_file.INPUTS)
    for rows, length in ((1, 1), (4, 11), (2, LENGTH)):
        inputs = inputs_of(length, rows)
        found = session.run(
            ["prediction_logits", "seq_relationship_logits"], {name: x.numpy() for name, x in inputs.items()}
        )
        for one, other in zip(found, logits_of_project(run[1], inputs)[1:]):
            assert np.abs(one - other.numpy()).max() < 1e-5


HEADS = {"BertForSequenceClassification": 3, "BertForTokenClassification": 3, "BertForMultipleChoice": 1}


@pytest.mark.parametrize("kind", [*HEADS, "BertForQuestionAnswering"])
def test_the_outputs_of_an_onnx_file_are_those_of_transformers_class(tmp_path, kind):
    theirs = save_fine_tuned(tmp_path, kind, num_labels=HEADS.get(kind, 2))
    config = Config(model=sizes_of(read_model(str(tmp_path))))
    model = Model(config.model)
    if kind in HEADS:
        add_label_head(model, config, HEADS[kind], pools=kind != "BertForTokenClassification")
    else:
        model.qa_outputs = torch.nn.Linear(config.model.hidden_size, 2)
    model.load_state_dict(theirs.state_dict())
    graph, inputs = onnx_file.Graph(model.eval(), kind), inputs_of(9, rows=6, vocab=len(WORDS))
    inside = inputs["attention_mask"].bool()
    if kind == "BertForMultipleChoice":
        inputs = {name: tensor.view(2, 3, 9) for name, tensor in inputs.items()}
    with torch.no_grad():
        found, expected = graph(*(inputs[name] for name in onnx_file.INPUTS)), theirs(**inputs)
    assert list(onnx_file.OUTPUTS[kind]) == list(expected)
    for one, other in zip(found, expected.to_tuple()):
        assert one.shape == other.shape
        of_tokens = one.shape[:2] == inside.shape
        assert ((one - other)[inside] if of_tokens else one - other).abs().max() < 1e-5
    if kind == "BertForMultipleChoice" and onnx_is_there():
        onnx_file.write_onnx(model, kind, theirs.config.to_dict(), str(tmp_path / "model.onnx"))  # which checks it


def test_the_model_card_is_the_hubs_form_filled_in_from_the_run(run, exported):
    card = ModelCard.load(exported / "README.md")
    with open(run[0] / "run" / "held_out.json") as file:
        held_out = json.load(file)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "fill-mask")
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {name: round(value, 4) for name, value in held_out.items() if isinstance(value, float)}
    assert {result.dataset_name for result in data.eval_results} == {"train-00001.h5"}
    if onnx_is_there():
        assert (data.language, data.model_name, data.tags) == ("tr", "Kuş", ["bert", "fill-mask", "onnx"])
    for words in (
        "after step 3 of 3, trained on 72 samples by bert-pretraining, from random weights",
        "| files | train-00000.h5 |\n| samples | 67 in 1 file |\n| held out | train-00001.h5 |",
        "| `optimizer.name` | lamb |\n| `optimizer.learning_rate` | 0.01 |",
        "On 33 held-out samples (`train-00001.h5`), after step 3:",
        f"| Metric | |\n|---|---|\n| loss | {results['loss']:g} |",
        f"torch {torch.__version__}",
        "sequences/s (median)",
        "## Licence\n\n`apache-2.0`",
    ):
        assert words in card.text, words
    assert ("curve.png" in os.listdir(exported)) == ("(curve.png)" in card.text)


def test_the_card_of_a_branch_names_the_run_that_it_began_with(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "step_00000003")
    state = json.loads((tmp_path / "step_00000003" / "training_state.json").read_text())
    state["config"]["training"]["branch_from"] = "/home/me/runs/wiki@2"
    write_json(str(tmp_path / "step_00000003" / "training_state.json"), state)
    assert main([str(tmp_path / "step_00000003"), str(tmp_path / "out"), *LICENSE]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from the state of another run, `wiki@2`." in card and "random weights" not in card
    lines = [{"samples_seen": seen, "sequences_per_second": 10} for seen in (1000, 1010, 1020)]
    assert throughput(lines) == "10.0 sequences/s (median), 3 s in all."


def test_nothing_of_the_machine_gets_out(run, exported):
    there = {
        os.path.relpath(os.path.join(place, name), exported) for place, _, names in os.walk(exported) for name in names
    }
    expected = {"README.md", "config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"}
    assert there - {"curve.png", "onnx/model.onnx"} == expected
    for name in there - {"curve.png"}:
        content = (exported / name).read_bytes()
        for secret in (str(run[0]), ROOT, "run_pretraining", "stack_trace"):
            assert secret.encode() not in content, (name, secret)


def save_fine_tuned(folder, kind, **settings):
    """A folder as a checkpoint of a task with this class has it, beside no run; and the model."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=LENGTH, **sizes, **settings)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder)
    write_tokenizer_files(str(folder), WORDS, LENGTH)
    best = {"step": 5, "samples": 40, "loss": 0.5, "pearson": 0.87654321}
    training = Config(training=dataclasses.replace(Config().training, start_from="/home/me/runs/wiki/model/"))
    training.data.held_out_files = ["https://me:secret@host/dev.tsv?token=secret", "s3://bucket/secret/other.tsv"]
    state = {"step": 5, "samples_seen": 40, "best": best, "config": dataclasses.asdict(training)}
    write_json(str(folder / "training_state.json"), state)
    return model


LABELS = {"id2label": {0: "bad", 1: "good", 2: "fine"}, "label2id": {"bad": 0, "good": 1, "fine": 2}}


@pytest.mark.parametrize(
    "kind, task, settings",
    [
        ("BertForSequenceClassification", "text-classification", LABELS),
        ("BertForTokenClassification", "token-classification", LABELS),
        ("BertForQuestionAnswering", "question-answering", {}),
        ("BertForMultipleChoice", None, {}),
        ("BertForPreTraining", "fill-mask", {}),
    ],
)
def test_the_snippet_of_each_class_runs_with_the_same_logits_and_labels(
    tmp_path, monkeypatch, capsys, kind, task, settings
):
    model = save_fine_tuned(tmp_path / "checkpoint", kind, **settings)
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "tuned"), *LICENSE]) == 0
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert card.data.pipeline_tag == task
    result = card.data.eval_results[-1]
    assert (result.metric_type, result.metric_name, result.metric_value) == ("pearsonr", "pearson", 0.8765)
    assert "from the weights of `model`" in card.text
    assert "`dev.tsv, other.tsv`" in card.text and "secret" not in card.content
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "tuned")
    assert loaded.config.id2label == settings.get("id2label", loaded.config.id2label)
    inputs = inputs_of(9, rows=2, vocab=len(WORDS))
    if kind == "BertForMultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        for one, other in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple()):
            assert (one - other).abs().max() < 1e-5
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() or kind == "BertForQuestionAnswering"  # where the end is before the start


def test_what_cannot_be_exported_is_said_and_nothing_is_written(run, tmp_path, monkeypatch, capsys):
    _, checkpoint = run

    def fault(*words, status=2, folder=checkpoint):
        assert main([str(folder), str(tmp_path / "out"), *words]) == status
        assert os.listdir(tmp_path) == []
        return capsys.readouterr().err

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "--license is missing" in fault()
    assert "--license is Apache 2.0, expected the hub's name" in fault("--license", "Apache 2.0")
    assert "--language is /tr, expected a code" in fault(*LICENSE, "--language", "/tr")
    assert "expected --push USER/NAME" in fault(*LICENSE, "--private")
    assert "--push is name, expected USER/NAME" in fault(*LICENSE, "--push", "name")
    assert "hf auth login" in fault(*LICENSE, "--push", "user/name")
    with monkeypatch.context() as without:
        without.setattr(onnx_file, "PACKAGES", ("onnx_gone",))
        assert "--onnx needs onnx_gone: pip install onnx_gone" in fault(*LICENSE, "--onnx")
    if onnx_is_there():
        monkeypatch.setattr(onnx_file, "TOLERANCE", 0)
        assert "ONNX Runtime's prediction_logits of inputs [1, 32] differ" in fault(*LICENSE, "--onnx", status=1)
        monkeypatch.setattr(onnx_file, "OUTPUTS", {})
        assert "the model is a BertForPreTraining, expected one of" in fault(*LICENSE, "--onnx")
    os.rename(os.path.join(checkpoint, "training_state.json"), os.path.join(checkpoint, "gone"))
    assert "training_state.json: no such file; expected the folder of a checkpoint" in fault(*LICENSE)
    os.rename(os.path.join(checkpoint, "gone"), os.path.join(checkpoint, "training_state.json"))


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to make a repository and upload small files. `files` are those it got."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            server.created.append(json.loads(body))
            self.answer({"url": f"{os.environ['HF_ENDPOINT']}/user/name"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/user/name/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif path == "/api/models/user/name/commit/main" and not server.is_full:
            parts = [json.loads(line) for line in body.splitlines()]
            files = [part["value"] for part in parts if part["key"] == "file"]
            server.files.update({file["path"]: base64.b64decode(file["content"]) for file in files})
            url = f"{os.environ['HF_ENDPOINT']}/user/name/commit/0"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"error": "no room"}, 403)

    def do_GET(self):
        is_there = self.path == "/api/models/user/name"
        self.answer({"id": "user/name", "private": self.server.private} if is_there else {}, 200 if is_there else 404)

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.tokens, server.private, server.is_full = {}, [], set(), True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", os.environ["HF_ENDPOINT"])
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_the_folder_and_keeps_no_token(run, hub, tmp_path, capsys):
    words = [run[1], str(tmp_path / "out"), *LICENSE, "--push", "user/name"]
    assert main([*words, "--private"]) == 0
    assert "uploaded    http://127.0.0.1" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b'model="user/name"' in hub.files["README.md"] and b"\n# name\n" in hub.files["README.md"]
    assert not any(b"hf_of_a_test" in content for content in hub.files.values())
    (made,) = hub.created
    assert (made["organization"], made["name"]) == ("user", "name") and "private" in json.dumps(made)
    assert "Bearer hf_of_a_test" in hub.tokens

    hub.files.clear()
    hub.private = False  # it was there, and public
    assert main([run[1], str(tmp_path / "other"), *words[2:], "--private"]) == 2
    assert "user/name is there and public" in capsys.readouterr().err and hub.files == {}
    hub.is_full = True
    assert main([run[1], str(tmp_path / "third"), *words[2:]]) == 1
    said = capsys.readouterr().err
    assert "third is made, but not uploaded: " in said and f"hf upload user/name {tmp_path / 'third'}" in said
    assert "hf_of_a_test" not in said and AutoTokenizer.from_pretrained(tmp_path / "third")


def test_help_teaches_by_an_example_and_comes_without_importing_torch():
    code = "import sys, bert.export; sys.exit('torch' in sys.modules)"
    assert_help_teaches("bert.export", "python -m bert.export runs/", code)
