# SPDX-License-Identifier: Apache-2.0
"""What the constructor accepts and refuses, and parameter groups."""

import re

import pytest
import torch

from methods import (
    METHODS,
    assert_same,
    every_engine_method,
    every_method,
    every_solo_method,
    give_grads,
    make_params,
    train,
)

TORCH_TEXTS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "betas": "Invalid beta",
    "weight_decay": "Invalid weight_decay value",
    "momentum": "Invalid momentum value",
}
REFUSALS = [
    pytest.param(method, keyword, value, id=f"{method.id}-{keyword}-{value}")
    for method in METHODS
    for keyword, values in method.refused.items()
    for value in values
]


def refusal(keyword: str, value: object) -> re.Pattern[str]:
    """Names the keyword in torch's words and ends with the value, or the bad one of the pair."""
    shown = repr(value)
    if keyword == "betas" and isinstance(value, tuple) and len(value) == 2:
        index = 0 if not 0 <= value[0] < 1 else 1
        number = re.escape(str(value[index]))
        return re.compile(rf"Invalid beta parameter at index {index}: {number}")
    text = TORCH_TEXTS.get(keyword, f"Invalid {keyword} value")
    return re.compile(rf"{text}[^:]*: ['\"]?{re.escape(shown.strip(chr(39)))}")


@pytest.mark.parametrize(("method", "keyword", "value"), REFUSALS)
def test_bad_values_are_refused_by_name(method, keyword, value):
    with pytest.raises(ValueError, match=refusal(keyword, value)) as error:
        method(make_params(), **{keyword: value})
    if method.engine:
        assert "allowed" in str(error.value)


@pytest.mark.parametrize(
    ("method", "keyword", "value"), [row for row in REFUSALS if row.values[0].engine]
)
def test_bad_values_in_a_group_are_refused_by_name(method, keyword, value):
    first, second = make_params(((3, 2), (2, 2)))
    with pytest.raises(ValueError, match=refusal(keyword, value)):
        method([{"params": [first]}, {"params": [second], keyword: value}])
    optimizer = method([first])
    with pytest.raises(ValueError, match=refusal(keyword, value)):
        optimizer.add_param_group({"params": [second], keyword: value})
    assert len(optimizer.param_groups) == 1
    train(optimizer, [first], 2)


@every_engine_method
def test_nesterov_needs_momentum(method):
    if not method.takes("nesterov"):
        pytest.skip("it has no momentum of its own")
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        method(make_params(), nesterov=True, momentum=0.0)


@every_engine_method
def test_unknown_keywords_are_refused(method):
    with pytest.raises(TypeError, match="learning_rate"):
        method(make_params(), learning_rate=0.1)


@every_engine_method
def test_unknown_policies_in_a_group_are_left_to_their_owner(method):
    (p,) = make_params(((3, 2),))
    optimizer = method([{"params": [p], "my_tag": "head"}])
    train(optimizer, [p], 2)
    assert optimizer.param_groups[0]["my_tag"] == "head"


@every_method
def test_a_single_tensor_is_refused(method):
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        method(torch.nn.Parameter(torch.zeros(2, 2)))


@every_method
def test_an_empty_list_is_refused(method):
    with pytest.raises(ValueError, match="empty parameter list"):
        method([])


@every_method
def test_duplicates_warn_in_a_group_and_fail_across_groups(method):
    (p,) = make_params(((3, 2),))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        method([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        method([{"params": [p]}, {"params": [p]}])


@every_method
def test_a_non_leaf_is_refused(method):
    with pytest.raises(ValueError, match="non-leaf"):
        method([torch.ones(2, 2, requires_grad=True) * 2])


@every_method
def test_every_keyword_is_a_default_and_a_group_key(method):
    optimizer = method(make_params())
    for keyword in method.options:
        assert keyword in optimizer.defaults
        assert keyword in optimizer.param_groups[0]


@every_method
def test_named_parameters_give_the_same_run(method):
    def model():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).double()

    bare, named = model(), model()
    train(method(bare.parameters()), list(bare.parameters()), 5)
    optimizer = method(named.named_parameters())
    names = [name for name, _ in named.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    train(optimizer, list(named.parameters()), 5)
    assert_same(list(bare.parameters()), list(named.parameters()))


@every_method
def test_names_are_all_or_nothing(method):
    first, second = make_params(((3, 2), (2, 2)))
    optimizer = method([("first", first)])
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [second]})


@every_solo_method
def test_groups_keep_their_own_values(method):
    params = make_params(((4, 3), (3, 5), (5,)))
    alone = make_params(((4, 3), (3, 5), (5,)))
    values = [{"lr": 0.01}, {"lr": 0.1, "weight_decay": 0.2}, {"betas": (0.5, 0.8)}]
    if method.takes("eps"):
        values[2]["eps"] = 1e-3
    together = method([{"params": [p], **v} for p, v in zip(params, values, strict=True)])
    apart = [method([p], **v) for p, v in zip(alone, values, strict=True)]
    for step in range(6):
        give_grads(params, step)
        give_grads(alone, step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    torch.testing.assert_close(params, alone, rtol=1e-12, atol=1e-12)


@every_solo_method
def test_a_group_added_later_starts_its_own_run(method):
    params = make_params(((4, 3), (3, 5), (5, 4)))
    alone = make_params(((4, 3), (3, 5), (5, 4)))
    optimizer = method(params[:1])
    single = [method([p]) for p in alone]
    for step in range(7):
        if step == 3:
            optimizer.add_param_group({"params": params[1:], "lr": 0.05})
            for late in single[1:]:
                late.param_groups[0]["lr"] = 0.05
        active = len(params) if step >= 3 else 1
        give_grads(params, step)
        give_grads(alone, step)
        optimizer.step()
        for late in single[:active]:
            late.step()
    torch.testing.assert_close(params, alone, rtol=1e-12, atol=1e-12)


@every_method
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1-element"])
def test_the_learning_rate_may_be_a_tensor(method, shape):
    # A power of two, so that the float32 tensor and the Python float are the same number.
    plain, tensor = make_params(), make_params()
    train(method(plain, lr=2.0**-6), plain, 5)
    train(method(tensor, lr=torch.full(shape, 2.0**-6)), tensor, 5)
    # torch.optim divides it by the bias correction in float32.
    close = 1e-14 if method.engine else 1e-7
    torch.testing.assert_close(plain, tensor, rtol=close, atol=close)


@every_method
def test_a_longer_tensor_learning_rate_is_refused(method):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        method(make_params(), lr=torch.tensor([0.1, 0.2]))
