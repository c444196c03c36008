"""One import name, `auxstream`; the folders below it live at the repository's top level."""

from setuptools import setup

setup(
    packages=["auxstream", "auxstream.runtime", "auxstream.capture", "auxstream.kernels", "auxstream.bench"],
    package_dir={
        "auxstream": "auxstream",
        "auxstream.runtime": "runtime",
        "auxstream.capture": "capture",
        "auxstream.kernels": "kernels",
        "auxstream.bench": "bench",
    },
    package_data={"auxstream": ["py.typed"]},
)
