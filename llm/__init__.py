"""Manyformer: one trainer, one decoder and one decode path; published architectures are interchangeable parts."""
