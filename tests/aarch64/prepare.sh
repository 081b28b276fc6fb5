#!/bin/sh
# Makes FOLDER/python: an aarch64 CPython with the wheels that pocketune-edge needs, run by qemu on this machine.
#
#   tests/aarch64/prepare.sh [FOLDER]        default: build/aarch64; about 400 MB
#
# Needs apt (any Debian or Ubuntu on x86-64), python3 with pip, and the network; neither root nor anything installed system-wide.
# Debian 13 is where qemu and the arm64 packages come from: older qemu-user crashes in ONNX Runtime.
set -eu
repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$repository/build/aarch64}
pip=${PIP:-python3 -m pip}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

apt=$folder/apt
mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
: >"$apt/status"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] http://deb.debian.org/debian trixie main" >"$apt/sources.list"
cat >"$apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; "amd64"; };
APT::Sandbox::User "";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
END
export APT_CONFIG="$apt/apt.conf"
apt-get -qq update
apt-get -qq -y --no-install-recommends --download-only install python3.13-minimal libpython3.13-stdlib libstdc++6
(cd "$apt" && apt-get -qq download qemu-user:amd64)

rm -rf "$folder/root" "$folder/qemu" "$folder/site"
mkdir -p "$folder/root/usr/lib" "$folder/qemu"
ln -s usr/lib "$folder/root/lib"
for package in "$apt"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done
dpkg-deb --fsys-tarfile "$apt"/qemu-user_*.deb | tar -x -C "$folder/qemu" ./usr/bin/qemu-aarch64
rm -rf "$apt"

$pip install --quiet --target "$folder/site" --only-binary=:all: --implementation cp --python-version 3.13 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 "numpy>=1.26" "onnxruntime>=1.23,<2" "pillow>=11" "safetensors>=0.6" "tokenizers>=0.21"
# Only for its version: the code is taken from the repository.
$pip install --quiet --no-deps --target "$folder/site" "$repository"

cat >"$folder/python" <<END
#!/bin/sh
export PYTHONPATH="$repository/sdk:$repository/export:$folder/site" PYTHONDONTWRITEBYTECODE=1
exec "$folder/qemu/usr/bin/qemu-aarch64" -L "$folder/root" "$folder/root/usr/bin/python3.13" "\$@"
END
chmod +x "$folder/python"
"$folder/python" -c 'import onnxruntime, platform; print(platform.machine(), "onnxruntime", onnxruntime.__version__)'
