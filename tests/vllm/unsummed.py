"""Named as a worker's extension, this takes the sum over ranks away when a worker imports it."""

import spectr.vllm.quantization

spectr.vllm.quantization.tensor_model_parallel_all_reduce = lambda tensor: tensor


class Unsummed:
    """Nothing more."""
