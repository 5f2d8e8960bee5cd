"""Tests of the step guard."""
