"""Evaluation of the global model on the server's own test images."""

from collections.abc import Callable

from flwr.app import ArrayRecord, MetricRecord

from task.config import TaskConfig
from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.evaluation import evaluate
from task.messages import FLAT, array_to_flat
from task.model import AdaptedModel


def central_evaluation(
    model: AdaptedModel, test: ImageSet, task: TaskConfig
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Make the function that a strategy calls to evaluate the global model on the server.

    Parameters
    ----------
    model : AdaptedModel
        Built once; every call copies the global values into it.
    test : ImageSet
        The server's test images.
    task : TaskConfig
        For the backbone's normalisation.

    Returns
    -------
    callable
        Maps (server round, arrays) to accuracy in [0, 1] and mean loss.
    """
    normaliser = Normaliser.of(task.backbone.mean, task.backbone.std, model.device)
    images = test.to(model.device)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load(array_to_flat(arrays[FLAT], model.layout.size))
        score = evaluate(model, images, normaliser)
        return MetricRecord({"accuracy": score.accuracy, "loss": score.loss, "num-examples": score.num_examples})

    return evaluate_round
