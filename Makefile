# make demo    stages I to III, shortened, from the teacher that ships, a clip upscaled, all measured (15 min, 2 cores)
# make test    lint and every test (5 min, 2 cores)
# make clean   remove what the demo wrote: stages I to III of out/tiny, the report, the clip

PYTHON ?= python3
OUT    ?= out/tiny
EVAL   ?= --max_clips 1
RUN     = .venv/bin/python
# two processes of one thread train faster on two cores than one process of two threads; a single GPU takes only one
TRAIN   = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node=2

demo: .venv/ready
	$(TRAIN) stage1_pd.py --out $(OUT) --batch 2 --steps_per_phase 35 --resume
	$(TRAIN) stage2_dual.py --out $(OUT) --batch 2 --steps 30 --aux_warmup 20 --lr 1e-4 --resume
	$(TRAIN) stage3_dpo.py --out $(OUT) --batch 2 --steps 30 --pairs 10 --resume
	$(RUN) infer.py samples/lr/apple.mp4 $(OUT)/upscaled.mp4 --ckpt $(OUT)/stage3/last.pt
	$(RUN) evaluate.py --out $(OUT) $(EVAL)

test: .venv/ready-test
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt requirements-wan.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf $(OUT)/stage[123] $(OUT)/report $(OUT)/upscaled.mp4

.PHONY: demo test clean
