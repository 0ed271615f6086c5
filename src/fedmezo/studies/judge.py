"""How good a model is: loss and accuracy on every evaluation split, written answers where they are asked for."""

from fedmezo.models.bench import Evaluation
from fedmezo.studies.build import Built
from fedmezo.studies.metrics import written_metrics

__all__ = ["flat", "judge"]


def judge(built: Built) -> dict[str, dict[str, float]]:
    """Returns split -> metrics of the model as it stands."""
    return {name: _judge_one(built, name) for name in built.data.evaluation}


def _judge_one(built: Built, name: str) -> dict[str, float]:
    examples, settings = built.data.evaluation[name], built.config.eval
    metrics = flat(built.bench.evaluate(examples))
    written = written_metrics(
        built.bench,
        built.loaded.tokenizer,
        examples=examples,
        records=built.data.records,
        names=settings.metrics,
        max_new_tokens=settings.max_new_tokens,
    )
    return {**metrics, **written}


def flat(evaluation: Evaluation) -> dict[str, float]:
    """Returns an evaluation as metric -> value; categories become "category/<name>/<metric>"."""
    flat: dict[str, float] = {
        "loss": evaluation.loss,
        "tokens": evaluation.tokens,
        "examples": evaluation.examples,
    }
    optional = {"accuracy": evaluation.accuracy, "token_accuracy": evaluation.token_accuracy}
    flat |= {name: value for name, value in optional.items() if value is not None}
    for category, scores in evaluation.categories.items():
        flat[f"category/{category}/loss"] = scores.loss
        flat[f"category/{category}/examples"] = scores.examples
        if scores.accuracy is not None:
            flat[f"category/{category}/accuracy"] = scores.accuracy
    return flat
