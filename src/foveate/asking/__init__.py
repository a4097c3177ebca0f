"""Loads a model and asks it about pictures, for the commands and the evaluation; knows neither of them."""
