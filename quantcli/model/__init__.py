"""What a checkpoint is: lazy reading and writing, block streaming, and the structure of a decoder."""
