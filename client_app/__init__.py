"""What runs beside the data: the ClientApp, local LoRA training, evaluation."""
