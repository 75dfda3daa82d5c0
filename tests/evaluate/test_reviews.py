import json
import math
import random
import statistics
from collections import defaultdict
from fractions import Fraction

import pytest

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.evaluate.judge import reviews
from llava_jax.evaluate.judge.reviews import (
    SummarizeReviews,
    Unscored,
    parse_as_published,
    parse_scores,
    read_reviews,
    summarize,
    summarize_as_published,
)

SEPARATOR = "================================="


def review(pair: list, category: str | None = "conv", question: int = 0) -> dict:
    found = {"id": question + 1, "question_id": question, "answer1_id": question, "answer2_id": "x",
             "category": category, "content": "", "tuple": pair}
    return found if category else {"question_id": question, "score": pair}


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("text, pair", [
    ("8 7\nBoth are good.", [8, 7]), ("8,7", [8, 7]), ("8.5 7", [8.5, 7]), ("8 7\r\nx", [8, 7]), ("11 0", [11, 0]),
    ("-1 -2.5", [-1, -2.5]), ("1e1 1_0", [10, 10]), ("inf 3", [math.inf, 3]), ("\t8 7\xa0", [8, 7]), (" 8,", [-1, -1]),
    ("8, 7", [-1, -1]), ("8  7", [-1, -1]), ("8 7 ", [-1, -1]), ("Score: 8 7", [-1, -1]), ("8/10 7/10", [-1, -1]),
    ("\n8 7", [-1, -1]), ("", [-1, -1]), ("8", [-1, -1]), ("eight seven", [-1, -1]), ("8 7 6", [-1, -1]),
])
def test_scores_as_the_original_reads_them(text, pair):
    assert parse_as_published(text) == pair


@pytest.mark.parametrize("text", [
    "8 7", "8,7", "8, 7\nBecause.", "  8   7  \n", "8/10 7/10", "8 / 10, 7 / 10", "8 out of 10, 7 out of 10", "**8 7**",
    "`8 7`", "[8, 7]", "(8; 7)", "8 | 7", "8 and 7.", "Score: 8 7", "Scores: 8 and 7", "Final ratings: [8, 7]",
    "Assistant 1: 8, Assistant 2: 7", "Assistant 1: 8/10\nAssistant 2: 7/10\nThe first is better.",
    "**Assistant 1**: 8\n\n**Assistant 2**: 7", "Scores for Assistant 1 and Assistant 2: 8 7", "Scores:\n8 7\n\n3 3",
    "The score of Assistant 1 and 2: 8 7", "8\n7\nfor these reasons", "Both are good.\n\nScores: 8 7\nSo be it.",
    "<think>\n3 4\nor 5 6?</think>\n\n8 7\nas 2 2 would be harsh", "8. 7.", "Well.\n8 7\nAgain:\n8 7",
])
def test_scores_in_other_words(text):
    assert parse_scores(text) == (8, 7)


@pytest.mark.parametrize("text, reason", [
    ("", "empty"), (" \n", "empty"), ("I'm sorry, but I cannot rate these answers.", "refused"),
    ("11/10 9/10", "out_of_range"), ("0 5", "out_of_range"), ("5 10.5", "out_of_range"), ("2023 12", "out_of_range"),
    ("11/10", "unreadable"), ("8/10", "unreadable"), ("8", "unreadable"), ("8 7 6", "unreadable"),
    ("-1 5", "unreadable"), ("8-7", "unreadable"), ("8,5 7,5", "unreadable"), ("7 for one, 8 for two", "unreadable"),
    ("Assistant 2: 7, Assistant 1: 8", "unreadable"), ("1. The first\n2. The second", "unreadable"),
    ("Well.\n8 7\nor\n7 8", "unreadable"), ("Assistant 1, Assistant 2", "unreadable"), ("nan inf", "unreadable"),
    ("8/5 7/5", "unreadable"), ("8/100 7/100", "unreadable"),
])
def test_replies_without_sure_scores(text, reason):
    with pytest.raises(Unscored) as raised:
        parse_scores(text)
    assert raised.value.reason == reason


def test_a_reply_that_was_cut_off():
    assert parse_scores("8 7\nBecause the", "length") == parse_scores("8 7\n", "length") == (8, 7)
    for text in ("8 1", "Let me think. 8 7 may do", "<think>\n8 7\nor\n6"):  # "8 1" may begin "8 10"
        with pytest.raises(Unscored) as raised:
            parse_scores(text, "length")
        assert raised.value.reason == "cut_off"
    with pytest.raises(Unscored) as raised:
        parse_scores("", "content_filter")
    assert raised.value.reason == "refused"


def test_what_the_original_reads_as_scores_is_read_the_same():
    rng, count = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(rng.choice(["8", "7.5", "10", "1", " ", " ", ",", "\n", "/10", "-", "x"])
                       for _ in range(rng.randint(3, 5)))
        pair = parse_as_published(text)
        try:
            scores = list(parse_scores(text))
        except Unscored:
            continue
        assert all(1 <= score <= 10 for score in scores)
        if pair != [-1, -1]:
            assert scores == pair
            count += 1
    assert count > 300


def naive_summary(rows: list[dict]) -> dict[str, tuple]:
    """With fractions, for scores that are whole: rounding to three digits, then to one, is all that is not exact."""
    groups = defaultdict(list)
    for row in rows:
        pair = row.get("tuple", row.get("score"))
        groups["all"].append(pair)
        if row.get("category"):
            groups[row["category"]].append(pair)
    found = {}
    for name in sorted(groups):
        first, second = (round(float(Fraction(sum(pair[side] for pair in groups[name]), len(groups[name]))), 3)
                         for side in (0, 1))
        found[name] = round(second / first * 100, 1), round(first * 10, 1), round(second * 10, 1)
    return found


def test_compat_prints_what_the_original_prints(tmp_path, capsys):
    rng = random.Random(3)
    for _ in range(100):
        rows = [review(rng.choice([[-1, -1], [rng.randint(2, 10), rng.randint(1, 10)], [9, 8]]),
                       rng.choice(["llava_bench_conv", "llava_bench_detail", "llava_bench_complex", None]), number)
                for number in range(rng.randint(10, 90))]
        path = write(tmp_path / "gpt4_text_some-model.jsonl", rows)
        assert SummarizeReviews((path,), compat=True).run() == 0
        expected = [f"{name} {a} {b} {c}" for name, (a, b, c) in naive_summary(rows).items()]
        assert capsys.readouterr().out.splitlines() == ["some-model", *expected, SEPARATOR]


def test_a_failed_judgement_lowers_both_means_in_compat_and_none_otherwise(tmp_path, capsys):
    rows = [review([8, 4]), review([4, 4], question=1), review([-1, -1], question=2)]
    path = write(tmp_path / "reviews_1.jsonl", rows)
    assert SummarizeReviews((path,), compat=True).run() == 0
    # means 11/3 and 7/3, rounded to 3.667 and 2.333
    assert capsys.readouterr().out == f"reviews_1\nall 63.6 36.7 23.3\nconv 63.6 36.7 23.3\n{SEPARATOR}\n"
    assert SummarizeReviews((path,)).run() == reviews.TOO_MANY_FAILED == 4
    printed = capsys.readouterr()
    assert "3 reviews, 1 without scores left out" in printed.out and "--max-failed 0.05" in printed.err
    assert "| score              | 66.7 | 66.7 |" in printed.out
    assert SummarizeReviews((path,), max_failed=0.34).run() == 0
    figure = summarize(rows)["conv"]
    assert figure == summarize(rows)["all"]
    assert (figure.ratio, figure.reference, figure.candidate, figure.count) == (pytest.approx(200 / 3), 60, 40, 2)


def test_the_score_is_the_ratio_of_means_and_not_the_mean_of_ratios():
    figures = summarize([review([10, 5], "llava_bench_detail"), review([2, 2], "llava_bench_conv")])
    assert list(figures) == ["llava_bench_conv", "llava_bench_detail", "all"]
    assert figures["all"].ratio == pytest.approx(100 * 7 / 12) and figures["llava_bench_detail"].ratio == 50


def test_a_score_of_nought_is_a_score(tmp_path, capsys):
    rows = [review([8, 0]), review([4, 4], question=1), review([0, 2], question=2)]
    figure = summarize(rows)["all"]
    assert (figure.ratio, figure.count) == (50, 3) and len(reviews.scored(rows)) == 3
    assert SummarizeReviews((write(tmp_path / "reviews_1.jsonl", rows),)).run() == 0
    assert "without scores" not in capsys.readouterr().out
    path = write(tmp_path / "zero.jsonl", [review([0, 8])])
    with pytest.raises(UserError, match="zero.jsonl: the reference's scores of 'conv' have a mean of 0"):
        SummarizeReviews((path,)).run()


def test_several_reviews_of_the_same_answers_get_their_mean(tmp_path, capsys):
    """As published: the mean of what LLaVA's summary prints of each file, rounded as that is."""
    def run(name, pairs, answer="a"):
        return write(tmp_path / name, [review(pair, question=n) | {"answer2_id": f"{answer}{n}"}
                                       for n, pair in enumerate(pairs)])

    first, second = run("r1.jsonl", [[8, 7], [9, 4], [3, 3]]), run("r2.jsonl", [[7, 7], [9, 5], [-1, -1]])
    other, part = run("r3.jsonl", [[8, 8]] * 3, "b"), run("r4.jsonl", [[8, 4]])
    ratios = [100 * 14 / 20, 100 * 12 / 16, 50]
    assert SummarizeReviews((first, other, second, part), max_failed=1).run() == 0
    printed = capsys.readouterr().out
    [told] = [text for text in printed.split("\n\n") if "the mean of" in text]
    mean, deviation = statistics.fmean(ratios), statistics.stdev(ratios)
    assert f"the mean of 3 files: {first}, {second}, {part}\n" in told
    assert f"| score              | {mean:.1f} ± {deviation:.1f} |" in told
    rounded = [summarize_as_published(read_reviews(path))["all"].ratio for path in (first, second, part)]
    assert f"| as published       | {statistics.fmean(rounded):.1f} ± " in told
    assert "1 of 3 judgements failed, and are left out (question 2: '')" in printed
    assert SummarizeReviews((first, second), compat=True).run() == 0
    printed = capsys.readouterr()
    assert "mean" not in printed.out and f"| as published       | {statistics.fmean(rounded[:2]):.1f} ± " in printed.err
    assert SummarizeReviews((first, other)).run() == 0 and "mean of" not in capsys.readouterr().out


def test_which_files_of_a_folder_and_which_questions(tmp_path, capsys):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("reviews_a", "review_b-0613", "gpt4_text_c", "answers"):
        write(folder / f"{name}.jsonl", [review([8, 8]), review([4, 2], question=1)])
    (folder / "reviews_d.json").write_text("{}")

    def names(*args) -> list[str]:
        assert cli.parse(SummarizeReviews, [str(folder), "--compat", *args]).run() == 0
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("all", "conv", "="))]

    assert names() == ["c", "review_b-0613", "reviews_a"]
    assert names("--version", "0613") == ["review_b-0613"] and names("--version", "0314") == ["c", "reviews_a"]
    assert names("--select", "review", "_a") == ["reviews_a"]
    whole = folder.rename(tmp_path / "all_reviews")
    folder = whole
    assert names() == ["answers", "c", "review_b-0613", "reviews_a"]
    assert SummarizeReviews((str(whole / "answers.jsonl"),), compat=True, ignore=("1",)).run() == 0
    assert "all 100.0 80.0 80.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="no files of reviews"):
        SummarizeReviews((str(whole),), select=("z",)).run()


@pytest.mark.parametrize("line, message", [
    ('{"question_id": 1, "category": "conv"}', "line 2: not a review"), ("[8, 7]", "line 2: not a JSON object"),
    ('{"question_id": 1, "category": "conv", "tuple": [8]}', "line 2: not a review"),
    ('{"question_id": 1, "category": "conv", "tuple": [8, "7"]}', "line 2: not a review"),
    ('{"question_id": 1, "category": 3, "tuple": [8, 7]}', "line 2: not a review"),
    ('{"category": "conv", "tuple": [8, 7]}', "line 2: not a review"), ('{"question_id": 1, "cat', "line 2: broken"),
])
def test_lines_that_are_no_reviews_are_named(tmp_path, line, message):
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps(review([8, 7])) + "\n" + line)
    with pytest.raises(UserError, match=message):
        SummarizeReviews((str(path),)).run()


def test_files_that_say_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="has no reviews"):
        SummarizeReviews((str(tmp_path / "empty.jsonl"),)).run()
    with pytest.raises(UserError, match="no such file of reviews"):
        SummarizeReviews((str(tmp_path / "none.jsonl"),)).run()
    path = write(tmp_path / "zero.jsonl", [review([1, 8]), review([-1, -1], question=1)])
    with pytest.raises(UserError, match="zero.jsonl: the reference's scores of 'all' have a mean of 0"):
        SummarizeReviews((path,), compat=True).run()
