"""What a person sees of a search: terminal, TensorBoard, pictures and files."""
