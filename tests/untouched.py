"""A check that a call has left a model as it was."""

from torch.nn.parameter import Parameter


def state(model):
    """Whatever a call might change: which modules there are, their attributes, tensors by identity, place and bytes."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        parts = {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}
        found[name] = (module, type(module), plain, parts)
    config = getattr(model, "config", None)
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_here = tensor.device.type != "meta"
        value = tensor.detach().clone() if is_here else None
        tensors[name] = (tensor, isinstance(tensor, Parameter), tensor.data_ptr() if is_here else 0, value)
    return found, dict(vars(config)) if config is not None else {}, tensors


def snapshot(model):
    """A function that asserts that the model is as it is now: same modules, hooks, settings, weights and memory."""
    modules, config, tensors = state(model)

    def check():
        now, config_now, tensors_now = state(model)
        assert now.keys() == modules.keys()
        for name, (module, kind, plain, parts) in modules.items():
            other, kind_now, plain_now, parts_now = now[name]
            assert other is module, name
            assert kind_now is kind, name
            assert plain_now.keys() == plain.keys(), name
            assert all(plain_now[key] is value or plain_now[key] == value for key, value in plain.items()), name
            assert parts_now.keys() == parts.keys(), name
            for key, part in parts.items():
                assert list(parts_now[key]) == list(part), f"{name}: {key}"
                assert all(parts_now[key][each] is value for each, value in part.items()), f"{name}: {key}"
        assert config_now == config
        assert tensors_now.keys() == tensors.keys()
        for name, (tensor, is_parameter, place, value) in tensors.items():
            tensor_now, is_parameter_now, place_now, value_now = tensors_now[name]
            assert tensor_now is tensor, name
            assert (is_parameter_now, place_now) == (is_parameter, place), name
            assert value is None or (value_now == value).all(), name

    return check
