"""What a run may learn."""

from dist_jax.tasks.classify import Classify
from dist_jax.tasks.multi_label import MultiLabel
from dist_jax.tasks.retrieve import Retrieve

# config.task.name -> (class names of each head, label_smoothing=, fusion=, other fields of
# config.task but those that are '') -> task.
TASKS = {'classify': Classify, 'multi_label': MultiLabel, 'retrieve': Retrieve}
