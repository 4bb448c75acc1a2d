# docker build -t ovq .                                   for CPUs
# docker build -t ovq:cuda --build-arg TORCH=cu128 .      for GPUs: run it with --gpus all
# docker run --rm -v "$PWD:/work" ovq demo --out demo-out
# docker run --rm -v "$PWD:/work" -p 8000:8000 -e OVQ_API_KEY ovq serve --host 0.0.0.0 --model runs/lm
#
# TORCH is what uv calls a torch backend: cpu, cu126, cu128 and so on. EXTRAS are those of lab/pyproject.toml.
ARG PYTHON=3.12

# The wheel, with kernels for AVX2 and AVX-512 (or arm64), is built where there is a compiler...
FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir build
COPY . /ovq
RUN OVQ_BUILD_KERNELS=1 python -m build --wheel --outdir /dist /ovq \
    && python -m build --wheel --outdir /dist /ovq/lab

# ... and installed where there is none, unless Triton needs one: it compiles what launches its kernels.
FROM python:${PYTHON}-slim
ARG TORCH=cpu
ARG EXTRAS=plots,text
RUN if [ "$TORCH" != cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /dist /dist
RUN pip install --no-cache-dir uv \
    && of_ovq=serve && if [ "$TORCH" != cpu ]; then of_ovq=serve,triton; fi \
    && uv pip install --system --no-cache --torch-backend "$TORCH" \
        "$(echo /dist/ovq-*.whl)[$of_ovq]" "$(echo /dist/ovq_lab-*.whl)[$EXTRAS]" \
    && rm -r /dist
RUN useradd --create-home ovq
USER ovq
WORKDIR /work
ENTRYPOINT ["ovq"]
CMD ["--help"]
