"Hand the metadata in settings.ini to setuptools"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages,setup

here = Path(__file__).parent
cfg = ConfigParser()
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_name']
version = re.search(r"__version__ = ['\"](.+?)['\"]", (here/lib/'__init__.py').read_text(encoding='utf-8'))[1]
minor = lambda v: int(v.split('.')[1])
statuses = {'3':'3 - Alpha', '4':'4 - Beta', '5':'5 - Production/Stable'}

setup(name=lib, version=version, description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    project_urls={'Repository':cfg['repository']} if cfg['repository'] else {}, license_expression=cfg['license'], license_files=['LICENSE'], packages=find_packages(include=[lib, f'{lib}.*']),
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()}, zip_safe=False,
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']},
    classifiers=[f"Development Status :: {statuses[cfg['status']]}", 'Intended Audience :: Developers',
        'Intended Audience :: Science/Research', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Programming Language :: Python :: 3 :: Only'] + [f'Programming Language :: Python :: 3.{i}'
            for i in range(minor(cfg['min_python']), minor(cfg['max_python'])+1)])
