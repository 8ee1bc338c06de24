"Open the lab in a browser: `python app.py`, then http://127.0.0.1:7860. Settings: [app] in settings.ini."
import sys
if __name__ == '__main__': print('the lab is opening …', flush=True) # the imports take some seconds
from rlhf_lab.app import build, serve
from rlhf_lab.core import LabError

try: app, demo = build()
except LabError as error: sys.exit(f'error: {error}')

if __name__ == '__main__':
    try: serve(app)
    except LabError as error: sys.exit(f'error: {error}')
