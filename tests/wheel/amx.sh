#!/bin/sh
# Products on AMX tiles (tiles.h), on a machine that has none: compiled for it and run by Bochs, which emulates a Sapphire
# Rapids processor, without an operating system (Linux lets nobody use tiles there, as Bochs lacks a feature it asks for).
#
#     tests/wheel/amx.sh FOLDER
#
# Takes a minute and fails where a product is wrong. FOLDER keeps what is made. Needs Debian 13's packages bochs, bochs-x,
# vgabios, grub-pc-bin, grub-common, xorriso, mtools and g++.
set -eu
folder=$(realpath -m "$1")
cd "$(dirname "$0")/amx"
mkdir -p "$folder/disk/boot/grub"

${CXX:-g++} -O2 -std=c++17 -march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -fno-exceptions -fno-rtti -fno-pic -no-pie \
    -fno-stack-protector -fno-threadsafe-statics -fno-tree-loop-distribute-patterns -Wno-psabi -nostdlib -static \
    -I ../../../src/ovq/ops/backends/cpu -Wl,-T,image.ld -Wl,--build-id=none boot.S tiles.cpp -o "$folder/tiles.elf"
objcopy -O binary "$folder/tiles.elf" "$folder/disk/boot/tiles"
printf 'set timeout=0\nmenuentry tiles { multiboot /boot/tiles }\n' >"$folder/disk/boot/grub/grub.cfg"
grub-mkrescue -o "$folder/disk.iso" "$folder/disk" 2>"$folder/disk.log"

cd "$folder"
cat >bochsrc <<'END'
cpu: model=sapphire_rapids, ips=200000000, reset_on_triple_fault=0
panic: action=fatal
memory: guest=128, host=128
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0-master: type=cdrom, path=disk.iso, status=inserted
boot: cdrom
port_e9_hack: enabled=1
display_library: rfb, options="timeout=0"
log: bochs.log
END
timeout 600 bochs -q -f bochsrc >bochs.txt 2>&1 || true
grep -a -E 'wrong|failed|passed' bochs.txt
grep -a -qx passed bochs.txt
