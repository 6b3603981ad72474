"""Some questions for the tiny chat model."""

from spectr.tasks import Example

CHOICES = ("yes", "no", "a good film")
PROMPTS = ["what is it", "is the grass blue", "who", "a good film of the sky is the x", "is it red", "the z of y"]
EXAMPLES = [
    Example(prompt=prompt, answer=CHOICES[i % 3], choices=CHOICES, label=i % 3) for i, prompt in enumerate(PROMPTS)
]
