"""What sizes alone say of a step: what it would keep of a model, and why it cannot work on one; no weights, no torch.

Methods ask here before and while they cut, plans and forecasts instead of cutting: one arithmetic for both. Reasons are
clauses after a step's name, None where there is none; as `mariotte.models.step.Step.refuse`.

Shapes: D model width, N query heads, K key-value heads, H head width, F neurons of a block, L blocks, O outputs and I
inputs of a matrix, R rank.
"""
