import os,warnings
try: from hypothesis import settings
except ImportError: settings = None # what needs a GPU can be tested without it

warnings.filterwarnings('ignore', category=FutureWarning)
# CI draws the same examples each time, a developer's machine others
if settings:
    settings.register_profile('all', deadline=None, derandomize='CI' in os.environ, database=None, max_examples=200)
    settings.load_profile('all')

