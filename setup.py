"""Package definition: `pip install -e .` for use, `pip install -e '.[test]'` to develop."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / 'README.md'
BEAM = 'apache-beam>=2.70'  # wants protobuf 6, which jax, grain, tfds and orbax take as well
PARQUET = 'pyarrow>=15.0'
HUB = 'huggingface_hub>=1.0'
SERVE = ['python-multipart>=0.0.18', 'starlette>=0.46', 'uvicorn>=0.30']

setup(
    name='dist_jax',
    version='0.1.0',
    description='Video models made of image models, in JAX/Flax, for Cloud TPU pods',
    long_description=README.read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['dist_jax*', 'input_pipeline*']),  # dist_jax.configs is a link
    package_data={'dist_jax': ['weights/*'], 'dist_jax.models': ['kernel_costs.json']},
    entry_points={'console_scripts': ['dist_jax=dist_jax.main:main']},
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',  # shards of videos; tfds asks for it on Linux only
        'av>=14.0',  # FFmpeg decoders and encoders in one wheel, releases the GIL
        'clu>=0.0.12',
        'einops>=0.8',
        'etils[epath]>=1.5',  # paths that may be bucket URLs
        'flatbuffers>=24.3',  # jax writes and reads exported programs with it
        'flax>=0.12',
        'ftfy>=6.2',  # CLIP's text cleaning
        'grain>=0.2.18',
        'instant-clip-tokenizer>=0.1.1',  # carries the CLIP byte-pair vocabulary
        'jax>=0.10',
        'matplotlib>=3.8',  # curves, contact sheets, confusion pictures
        'ml_collections>=1.0',
        'ml_dtypes>=0.4',  # bfloat16 tensors in safetensors and torch files
        'numpy>=2.0',
        'opencv-python-headless>=4.10',  # resize and colour conversion of uint8 frames
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.30',
        'pillow>=10.0',  # animations
        'rich>=13.7',  # tables and progress bars
        'safetensors>=0.5',
        'tensorstore>=0.1.60',  # large arrays in slices; orbax stores with it
        'tensorboardX>=2.6.2',  # event files without TensorFlow
        'tensorflow-datasets>=4.9.7',
    ],
    extras_require={
        # jax[tpu]: libtpu, which compiles for TPUs on any Linux machine (205 MB).
        'test': [
            'pytest>=8.0',
            'pytest-xdist>=3.5',
            'ruff>=0.8',
            'setuptools>=70.1',  # builds the wheel that is looked at
            BEAM,
            PARQUET,
            HUB,
            *SERVE,
            'jax[tpu]>=0.10; sys_platform == "linux" and platform_machine == "x86_64"',
        ],
        'docs': [
            'sphinx>=8.0',
            'myst-parser>=4.0',  # Markdown
            'furo>=2024.8',
            'jupytext>=1.16',  # notebooks as text
            'nbclient>=0.10',
            'ipykernel>=6.29',
        ],
        'beam': [BEAM],  # data sets built by many machines; [gcp] beside it for Dataflow
        'parquet': [PARQUET],  # features as tables
        'hub': [HUB],  # models from and to the Hugging Face Hub
        'serve': SERVE,  # a page and an endpoint
        # In an environment of its own: jax2onnx wants an older orbax-checkpoint.
        'onnx': ['jax2onnx>=0.17', 'onnx>=1.18', 'onnxruntime>=1.22'],
        'wandb': ['wandb>=0.19'],
        'mlflow': ['mlflow>=3.0'],
        'trackio': ['trackio>=0.40'],
        'benchmark': ['decord>=0.6', 'psutil>=5.9'],
        # Beside [benchmark], in an environment of its own: torch brings CUDA, several GB. Wants
        # the shared libraries of FFmpeg 4 to 8 (apt-get install ffmpeg).
        'torchcodec': ['torch>=2.13', 'torchcodec>=0.12'],
        'tpu': [
            'jax[tpu]>=0.10',
            'gcsfs>=2024.6',  # gs:// paths without TensorFlow
            'google-cloud-storage>=2.10',  # orbax deletes checkpoints in a bucket with it
        ],
        'cuda': ['jax[cuda12]>=0.10'],
    },
)
