# SPDX-License-Identifier: MIT
"""Packaging; the module itself is one file and needs none of this."""

import os
import re

import setuptools
from setuptools.command.sdist import sdist

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


class Sdist(sdist):
    """Adds the tests and, for old setuptools, the licence: there is no MANIFEST.in."""

    def make_distribution(self):
        self.filelist.extend(["LICENSE", "test_htsget.py"])
        super().make_distribution()


# setuptools 77 deprecated licence classifiers in favour of SPDX expressions.
SPDX = int(setuptools.__version__.split(".")[0]) >= 77

setuptools.setup(
    name="htsget",
    # Read, not imported: a build needs nothing but setuptools.
    version=re.search(r'^__version__ = "(.+)"$', read("htsget.py"), re.M).group(1),
    description="A GA4GH htsget client in one file, standard library only",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="The htsget.py developers",
    py_modules=["htsget"],
    python_requires=">=3.6",
    extras_require={"test": ["pytest"]},
    entry_points={"console_scripts": ["htsget = htsget:main"]},
    cmdclass={"sdist": Sdist},
    project_urls={"Specification": "https://samtools.github.io/hts-specs/htsget.html"},
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: Implementation :: CPython",
        "Programming Language :: Python :: Implementation :: PyPy",
        "Topic :: Internet :: WWW/HTTP",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
    ]
    + ["Programming Language :: Python :: 3.%d" % minor for minor in range(6, 15)]
    + ([] if SPDX else ["License :: OSI Approved :: MIT License"]),
    **{"license_expression" if SPDX else "license": "MIT"},
)
