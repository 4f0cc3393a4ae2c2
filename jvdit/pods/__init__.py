"""Forecasts time and memory of a program on a TPU pod, without the pod."""
