import gc,os,warnings
try: from hypothesis import settings
except ImportError: settings = None # what needs a GPU can be tested without it

warnings.filterwarnings('ignore', category=FutureWarning)
# CI draws the same examples each time, a developer's machine others
if settings:
    settings.register_profile('all', deadline=None, derandomize='CI' in os.environ, database=None, max_examples=200)
    settings.load_profile('all')

def pytest_collection_finish():
    "What is imported by now is not to be looked through in each collection of garbage, of which there is one after each failed attempt"
    gc.collect(); gc.freeze()
