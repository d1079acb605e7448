# SPDX-License-Identifier: MIT
"""Packaging; the module itself is one file and needs none of this."""

import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


setup(
    name="htsget",
    # Read, not imported: a build needs nothing but setuptools.
    version=re.search(r'^__version__ = "(.+)"$', read("htsget.py"), re.M).group(1),
    description="A GA4GH htsget client in one file, standard library only",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="The htsget.py developers",
    license="MIT",
    py_modules=["htsget"],
    python_requires=">=3.6",
    extras_require={"test": ["pytest"]},
    entry_points={"console_scripts": ["htsget = htsget:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
    ],
)
