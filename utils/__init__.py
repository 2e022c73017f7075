"""The course's shared package: what two lessons use lives here, once.

Imports run downwards only, from plots to files.
"""
