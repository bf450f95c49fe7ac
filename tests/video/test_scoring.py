"""Scoring of answers: the normalised match, the files it reads and writes, and a judge that fails in every way."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from videollava.eval.video import eval_video_qa as scorer
from videollava.eval.video import judge as judging
from videollava.eval.video.matching import matches, normalise

KEY = "sk-hush-0123456789"
SENTENCES = st.text() | st.lists(
    st.sampled_from(["The", "a", "two", "YES", "no", "ten", "3.5", "1,000", "dog", "don't", "-", ".", ",", "é"])
).map(" ".join)


# The normalised match.


@given(SENTENCES)
@example("a'\u0301")
@example("\u1112'\u1161")
@example("\u0130. \ufb01 \u210d \u00bd")
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@given(SENTENCES, SENTENCES)
def test_any_two_texts_can_be_compared(pred, answer):
    assert matches(pred, answer) in (True, False)


@given(SENTENCES.filter(lambda text: any(c.isalnum() for c in text)))
def test_an_answer_with_a_word_matches_itself(answer):
    assert matches(answer, answer)


@given(SENTENCES, st.text(alphabet="bcd", min_size=1), SENTENCES)
def test_an_answer_is_found_in_any_sentence(before, answer, after):
    assert matches(f"{before} {answer} {after}", answer)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The   DOG\n", "dog"),
        ("Two dogs.", "2 dogs"),
        ("ten or zero?", "10 or 0"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        ("T-shirt", "t shirt"),
        ("the", "the"),
        ("…!?", ""),
        ("\uff26\uff55\uff4c\uff4c width", "full width"),
        ("snow_board", "snow board"),
        ("about 1,000.", "about 1000"),
        ("3.5, not 3.", "3.5 not 3"),
        ("हिन्दी", "हिन्दी"),
        ("", ""),
    ],
)
def test_normal_forms(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("pred", "answer", "right"),
    [
        ("Two dogs.", "2", True),
        ("2", "two", True),
        ("a man", "man", True),
        ("man", "a man", True),
        ("The man is cooking in the kitchen.", "kitchen", True),
        ("a woman", "man", False),
        ("men", "man", False),
        ("man", "man in black", False),
        ("a hot, dog-like toy", "hot dog", True),
        ("a dog that is hot", "hot dog", False),
        ("12", "2", False),
        ("3.5 metres", "3", False),
        ("1,000 people", "1", False),
        ("yes, it is", "yes", True),
        ("Yes.", "yes", True),
        ("nothing", "no", False),
        ("No, but others say yes", "yes", False),
        ("No, but others say yes", "no", True),
        ("It is not.", "no", False),
        ("", "yes", False),
        ("", "man", False),
        ("", "", False),
        ("!", "!", False),
        ("yes, a man", "man", True),
    ],
)
def test_what_matches(pred, answer, right):
    assert matches(pred, answer) is right


# Files.


def prediction(number, pred="dog", answer="dog", **more):
    return {"id": f"q{number}", "question": f"What is {number}?", "answer": answer, "pred": pred, **more}


def write(folder, predictions, name="pred.json"):
    file = folder / name
    file.write_text("".join(json.dumps(one) + "\n" for one in predictions))
    return file


def run(file, *arguments):
    return scorer.main(["--pred_path", str(file), *map(str, arguments)])


def refusal(capsys, file, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(file, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def table(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_scores_by_match(tmp_path, capsys):
    predictions = [prediction(n, "two", "2", type=7) for n in range(3)] + [prediction(3, "yes", "no", type=3)]
    assert run(write(tmp_path, predictions)) == 0
    rows = table(capsys.readouterr().out)
    assert rows["overall"] == ["4", "3", "0.750", "0.217"]
    assert list(rows)[2:] == ["overall", "3 yes/no", "7 number"]
    scores = json.loads((tmp_path / "pred_scores.json").read_text())
    assert scores["scored_by"] == "normalised match"
    assert scores["by_type"]["3 yes/no"] == {"count": 1, "right": 0, "accuracy": 0, "standard_error": 0}
    assert scores["overall"]["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_types_are_optional_and_may_be_texts(tmp_path, capsys):
    assert run(write(tmp_path, [prediction(0), prediction(1)])) == 0
    assert list(table(capsys.readouterr().out))[2:] == ["overall"]
    kinds = ["what", None, 12, "who", 2]
    predictions = [prediction(n, type=kind) for n, kind in enumerate(kinds)] + [prediction(9)]
    assert run(write(tmp_path, predictions), "--output_json", tmp_path / "new/scores.json") == 0
    names = ["2 temporal relation", "12", "what", "who", "no type"]
    assert list(table(capsys.readouterr().out))[3:] == names
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    assert list(scores["by_type"]) == names
    assert scores["by_type"]["no type"]["count"] == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 1, "question": "q"', "not JSON; write one whole JSON object on each line"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "not an object"),
        ('{"id": 1, "question": "q", "answer": "a"}', "no pred; a prediction has id, question, answer and pred"),
        ("{}", "no id, question, answer, pred"),
        (json.dumps(prediction(0)), "id 'q0' stood on an earlier line"),
        (json.dumps(prediction(1, pred=2)), "pred=2; write a text in quotes"),
        (json.dumps(prediction(1, type=[1])), "type=[1]; allowed are a whole number and a text"),
        (json.dumps(prediction(1) | {"id": None}), "id=None; allowed are"),
        (json.dumps(prediction(1) | {"id": 1.5}), "id=1.5; allowed are"),
    ],
)
def test_a_broken_line_is_named(tmp_path, capsys, line, words):
    file = tmp_path / "pred.json"
    text = f"{json.dumps(prediction(0))}\n\n{line}\n"
    file.write_bytes(text.encode(errors="surrogateescape"))
    error = refusal(capsys, file)
    assert f"{file}, line 3: " in error
    assert words in error
    assert not list(tmp_path.glob("*scores*"))


def test_a_separator_inside_a_text_ends_no_line(tmp_path):
    file = tmp_path / "pred.json"
    file.write_text(json.dumps(prediction(0, "dog\u2028\x85"), ensure_ascii=False) + "\r\n")
    assert run(file) == 0


def test_other_wrong_input_is_one_sentence(tmp_path, capsys):
    file = write(tmp_path, [])
    assert "no predictions" in refusal(capsys, file)
    assert "No such file" in refusal(capsys, tmp_path / "elsewhere.json")
    assert "--num_tasks 0: allowed is a whole number from 1 up" in refusal(capsys, file, "--num_tasks", 0)
    assert "say where it is with --api_base" in refusal(capsys, file, "--judge_model", "gpt-4")
    assert "--api_base '': write the whole address" in refusal(capsys, file, "--api_base", "")


# The judge.


class Judge(ThreadingHTTPServer):
    """An endpoint that finds exact matches right; `trouble` may answer in its stead, and `delay` is in seconds.

    trouble(question, times): what to send for a question that came so many times before: a text as the
    model's answer, a number as an HTTP status, bytes as the body, None for the usual.
    """

    daemon_threads = True
    trouble = staticmethod(lambda question, times: None)
    delay = 0.0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.lock = threading.Lock()
        self.asked, self.temperatures, self.models, self.now, self.most = [], [], set(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a killed client


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        judge = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = json.loads(body["messages"][0]["content"].split("\n\n")[-1])
        with judge.lock:
            times = judge.asked.count(texts["question"])
            judge.asked.append(texts["question"])
            judge.temperatures.append(body["temperature"])
            judge.models.add(body["model"])
            judge.now += 1
            judge.most = max(judge.most, judge.now)
        time.sleep(judge.delay)
        answer = judge.trouble(texts["question"], times)
        if answer is None:
            right = texts["reference"] == texts["candidate"]
            answer = json.dumps({"pred": "yes" if right else "no", "score": 5 if right else 1})
        status = answer if isinstance(answer, int) else 200
        if isinstance(answer, int):
            reply = json.dumps({"error": {"message": f"refused: {self.headers['Authorization']}"}}).encode()
        elif isinstance(answer, bytes):
            reply = answer
        else:
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        with judge.lock:
            judge.now -= 1
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("Retry-After-Ms", "5")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def verdicts(file):
    first, *lines = map(json.loads, file.read_text().splitlines())
    assert list(first) == ["judge_model", "predictions", "prompt"]
    return lines


def test_scores_by_judge(tmp_path, capsys, judge):
    predictions = [prediction(n, "dog" if n % 4 else "cat", type=n % 2) for n in range(12)]
    file = write(tmp_path, predictions)
    command = (file, "--output_dir", tmp_path / "out", "--api_base", judge.url, "--num_tasks", 3)
    assert run(*command) == 0
    rows = table(capsys.readouterr().out)
    assert rows["type"] == ["count", "right", "accuracy", "standard error", "mean score", "no verdict"]
    assert rows["overall"] == ["12", "9", "0.750", "0.125", "4.000", "0"]
    assert rows["0 motion"] == ["6", "3", "0.500", "0.204", "3.000", "0"]
    lines = verdicts(tmp_path / "out/pred_judged.jsonl")
    assert lines[0] == {"id": "q0", "pred": "no", "score": 1}
    assert [line["id"] for line in lines] == [one["id"] for one in predictions]
    scores = json.loads((tmp_path / "out/pred_judged_scores.json").read_text())
    assert scores["scored_by"] == "gpt-3.5-turbo"
    assert scores["no_verdict"] == []
    assert judge.models == {"gpt-3.5-turbo"}
    assert set(judge.temperatures) == {0}
    assert run(*command) == 0
    assert len(judge.asked) == 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pred_judged.jsonl",
        "pred_judged_scores.json",
    ]


def test_so_many_requests_at_a_time(tmp_path, judge):
    judge.delay = 0.1
    file = write(tmp_path, [prediction(n) for n in range(12)])
    assert run(file, "--api_base", judge.url, "--num_tasks", 4) == 0
    assert judge.most == 4


def test_passing_trouble_changes_no_verdict(tmp_path, judge):
    good = '{"pred": "yes", "score": 4}'
    answers = {
        "What is 0?": [500, 503, 429, None],
        "What is 1?": ["I cannot say", '{"pred": "maybe", "score": 1}', None],
        "What is 2?": ['{"pred": "yes", "score": 6}', '{"pred": "yes"}', None],
        "What is 3?": [b"<html>", b"{}", None],
        "What is 4?": [b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', None],
        "What is 5?": [f"```json\n{good.replace('yes', 'Yes')}\n```"],
        "What is 6?": [f'<think>{{"pred": "no", "score": 0}}?</think>{good}'],
        "What is 7?": ['{"pred": "yes", "score": NaN}', '{"pred": "yes", "score": true}', good],
    }
    judge.trouble = lambda question, times: answers[question][times]
    file = write(tmp_path, [prediction(n) for n in range(len(answers))])
    assert run(file, "--api_base", judge.url) == 0
    lines = verdicts(tmp_path / "pred_judged.jsonl")
    assert [(line["pred"], line["score"]) for line in lines] == [("yes", 5)] * 5 + [("yes", 4)] * 3
    assert sorted(judge.asked) == sorted(question for question, said in answers.items() for _ in said)
    assert set(judge.temperatures) == {0, 0.5, 1}


def test_verdicts_that_never_come_are_told(tmp_path, capsys, judge):
    never = {"What is 1?": "no idea", "What is 3?": 500, "What is 4?": 400}
    judge.trouble = lambda question, times: never.get(question)
    file = write(tmp_path, [prediction(n, type=n // 4) for n in range(5)] + [prediction(5, "\ud800", type=0)])
    command = (file, "--api_base", judge.url, "--num_tasks", 1)
    assert run(*command) == 3
    out = capsys.readouterr().out
    assert "no verdict for 4 of 6; the same command asks for them again:\n'q1'\n'q3'\n'q4'\n'q5'\n" in out
    assert "'q1': ValueError: none of 3 answers was a verdict" in out
    assert "'q3': InternalServerError: Error code: 500" in out
    assert "'q4': BadRequestError: Error code: 400" in out
    assert table(out)["overall"] == ["6", "2", "1.000", "0.000", "5.000", "4"]
    assert table(out)["1 spatial relation"] == ["1", "0", "-", "-", "-", "1"]
    scores = json.loads((tmp_path / "pred_judged_scores.json").read_text())
    assert scores["no_verdict"] == ["q1", "q3", "q4", "q5"]
    counts = {question: judge.asked.count(question) for question in never}
    assert counts == {"What is 1?": judging.MAX_ANSWERS, "What is 3?": 1 + judging.MAX_RETRIES, "What is 4?": 1}

    judge.asked.clear()
    never.clear()
    assert run(*command) == 3
    assert judge.asked == ["What is 1?", "What is 3?", "What is 4?"]
    assert [line["id"] for line in verdicts(tmp_path / "pred_judged.jsonl")] == ["q0", "q1", "q2", "q3", "q4"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_unreachable_judge_ends_the_run_at_once(tmp_path, capsys, judge, status):
    judge.trouble = lambda question, times: status
    file = write(tmp_path, [prediction(n) for n in range(50)])
    error = refusal(capsys, file, "--api_base", judge.url, "--api_key", KEY, "--num_tasks", 1)
    assert "no judge: check --api_base, --api_key and --judge_model" in error
    assert f"Error code: {status}" in error
    assert len(judge.asked) < 50
    judge.trouble = Judge.trouble
    assert run(file, "--api_base", judge.url) == 0


def test_no_server_at_all(tmp_path, capsys, judge, monkeypatch):
    monkeypatch.setattr(scorer, "MAX_RETRIES", 0)
    judge.shutdown()
    judge.server_close()
    assert "no judge: check --api_base" in refusal(capsys, write(tmp_path, [prediction(0)]), "--api_base", judge.url)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, judge):
    judge.delay = 0.1
    file = write(tmp_path, [prediction(n, "dog" if n % 3 else "cat") for n in range(30)])
    judged = tmp_path / "pred_judged.jsonl"
    command = [sys.executable, scorer.__file__, "--pred_path", str(file), "--api_base", judge.url, "--num_tasks", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OPENAI_API_KEY": KEY})
    end = time.monotonic() + 60
    while (not judged.exists() or judged.read_bytes().count(b"\n") < 6) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    before = judged.read_bytes()
    known = {json.loads(line)["id"] for line in before[: before.rfind(b"\n")].split(b"\n")[1:]}
    assert 5 <= len(known) < 30
    judged.write_bytes(before[: before.rfind(b"\n") + 1] + b'{"id": "q29", "pr')

    judge.delay = 0
    judge.asked.clear()
    assert run(file, "--api_base", judge.url, "--num_tasks", 2) == 0
    wanted = {f"What is {n}?" for n in range(30) if f"q{n}" not in known}
    # What the killed run had under way may only arrive now.
    assert wanted <= set(judge.asked)
    assert len(judge.asked) <= len(wanted) + 2
    assert [line["id"] for line in verdicts(judged)] == [f"q{n}" for n in range(30)]
    assert [line["pred"] for line in verdicts(judged)] == ["no", "yes", "yes"] * 10


def test_a_file_of_which_only_half_the_first_line_was_written(tmp_path, judge):
    (tmp_path / "pred_judged.jsonl").write_text('{"judge_mo')
    assert run(write(tmp_path, [prediction(0)]), "--api_base", judge.url) == 0
    assert len(verdicts(tmp_path / "pred_judged.jsonl")) == 1


def test_half_a_line_is_dropped_before_more_are_written(tmp_path):
    file = tmp_path / "pred_judged.jsonl"
    whole = '{"judge_model": "gpt"}\n{"id": 1, "pred": "yes", "score": 5}\n'
    file.write_text(whole + '{"id": 2, "pr')
    log, found = judging.open_verdicts(file, {"judge_model": "gpt"})
    log.close()
    assert found == {1: {"pred": "yes", "score": 5}}
    assert file.read_text() == whole


def test_verdicts_of_different_runs_are_never_mixed(tmp_path, capsys, judge, monkeypatch):
    file = write(tmp_path, [prediction(0), prediction(1)])
    command = (file, "--api_base", judge.url)
    assert run(*command) == 0
    before = (tmp_path / "pred_judged.jsonl").read_bytes()
    what_to_do = "give another --output_dir, or delete the file to judge all anew"
    error = refusal(capsys, *command, "--judge_model", "other")
    assert f"was written with judge_model gpt-3.5-turbo, and this run has other: {what_to_do}" in error
    write(tmp_path, [prediction(0), prediction(1, "cat")])
    error = refusal(capsys, *command)
    assert re.search(rf"was written with predictions \w+, and this run has \w+: {what_to_do}", error)
    write(tmp_path, [prediction(0), prediction(1)])
    monkeypatch.setattr(scorer, "PROMPT", "Is it so?\n\n")
    assert "was written with prompt" in refusal(capsys, *command)
    assert (tmp_path / "pred_judged.jsonl").read_bytes() == before
    assert len(judge.asked) == 2
    assert run(*command, "--judge_model", "other", "--output_dir", tmp_path / "new") == 0


@pytest.mark.parametrize("damage", ["{}\n", '{"id": "q0", "pred": "perhaps", "score": 1}\n', "what\n"])
def test_a_damaged_file_of_verdicts_is_refused(tmp_path, capsys, judge, damage):
    command = (write(tmp_path, [prediction(0)]), "--api_base", judge.url)
    assert run(*command) == 0
    with (tmp_path / "pred_judged.jsonl").open("a") as stream:
        stream.write(damage)
    assert "pred_judged.jsonl" in refusal(capsys, *command)
    assert len(judge.asked) == 1


@pytest.mark.parametrize("given", ["flag", "environment"])
def test_the_key_is_sent_and_never_told(tmp_path, capfd, judge, monkeypatch, given):
    answers = {"What is 0?": None, "What is 1?": 401, "What is 2?": 400, "What is 3?": KEY}
    judge.trouble = lambda question, times: answers[question]
    flags = ["--api_key", KEY]
    if given == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        flags = []
    file = write(tmp_path, [prediction(n) for n in range(4)])
    assert run(file, "--api_base", judge.url, "--num_tasks", 1, *flags) == 3
    told = "".join(capfd.readouterr())
    # What the server repeated of the request is there, but for the key.
    assert "Bearer ..." in told
    assert KEY not in told + "".join(path.read_text() for path in tmp_path.iterdir())
