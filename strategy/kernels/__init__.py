"""Functions of tensors: decoder layers, attention rows, selection and compilation."""
