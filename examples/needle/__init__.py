"""The model that ships: the text it is trained on, its tokenizer, its network and the measure of its accuracy."""
