import os,warnings
from hypothesis import settings

warnings.filterwarnings('ignore', category=FutureWarning)
# CI draws the same examples each time, a developer's machine others
settings.register_profile('all', deadline=None, derandomize='CI' in os.environ, database=None, max_examples=200)
settings.load_profile('all')

