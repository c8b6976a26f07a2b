"""What client and server share: model, layer units, data, message contract, config schema."""
