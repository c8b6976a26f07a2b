"""A trained model in the forms that others open: a peft adapter, a timm state dict, ONNX, with a model card."""
