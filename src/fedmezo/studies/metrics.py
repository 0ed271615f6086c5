"""Metrics of written answers: exact match and Rouge-L, by greedy decoding."""

from collections.abc import Sequence
from statistics import fmean

from fedmezo.data.prompt import Example
from fedmezo.data.tasks import Record

__all__ = ["exact_match", "rouge_l", "written_metrics"]


def exact_match(answer: str, reference: str) -> float:
    """Returns 1 if the texts are equal up to case and white space, else 0."""
    return float(" ".join(answer.lower().split()) == " ".join(reference.lower().split()))


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F1 of the longest common subsequence of words (package rouge-score, no stemming); empty gives 0."""
    from rouge_score.rouge_scorer import RougeScorer

    score: float = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    return score


def written_metrics(
    bench: object,
    tokenizer: object,
    *,
    examples: Sequence[Example],
    records: Sequence[Record],
    names: Sequence[str],
    max_new_tokens: int,
) -> dict[str, float]:
    """Returns the wanted ones of rouge_l and exact_match, averaged over the examples; writes every answer greedily."""
    functions = {"rouge_l": rouge_l, "exact_match": exact_match}
    wanted = [name for name in names if name in functions]
    if not wanted:
        return {}
    pairs = []
    for example in examples:
        row = example.rows[example.answer if len(example.rows) > 1 else 0]
        new = bench.generate(row.ids[: row.start], max_new_tokens=max_new_tokens)  # type: ignore[attr-defined]
        answer = tokenizer.decode(new, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
        pairs.append((answer, records[example.record].output))
    return {name: fmean(functions[name](answer, reference) for answer, reference in pairs) for name in wanted}
