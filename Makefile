# make demo    stages I to III from the teacher that ships, one clip upscaled, every stage measured (15 min, 2 cores)
# make test    lint and every test (6 min, 2 cores)
# make clean   remove what the demo wrote

PYTHON ?= python3
OUT    ?= out/tiny
EVAL   ?= --max_clips 2 --frames 9
RUN     = .venv/bin/python

demo: .venv/ready
	$(RUN) stage1_pd.py --out $(OUT) --resume
	$(RUN) stage2_dual.py --out $(OUT) --resume
	$(RUN) stage3_dpo.py --out $(OUT) --resume
	$(RUN) infer.py samples/lr/apple.mp4 $(OUT)/upscaled.mp4 --ckpt $(OUT)/stage3/last.pt
	$(RUN) evaluate.py --out $(OUT) $(EVAL)

test: .venv/ready-test
	.venv/bin/ruff check .
	$(RUN) -m pytest -q

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf out

.PHONY: demo test clean
