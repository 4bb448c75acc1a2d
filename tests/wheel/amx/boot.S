/* Starts tiles.cpp on a bare processor: the boot loader leaves it in 32 bits; this makes it 64, with AVX-512 and AMX on. */
    .set LOADED, 0x100000

    .code32
    .section .boot, "ax"
    .globl start
/* What GRUB looks for, with the addresses of a file that has none. */
    .align 4
header:
    .long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
    .long header, LOADED, end_of_data, end_of_memory, start

start:
    mov $stack, %esp
    /* The first GiB at its own addresses, in pages of 2 MiB. */
    movl $level3 + 3, level4
    movl $level2 + 3, level3
    mov $0x83, %eax
    xor %ecx, %ecx
1:  mov %eax, level2(, %ecx, 8)
    add $0x200000, %eax
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov $level4, %eax
    mov %eax, %cr3
    /* Extended pages, SSE, and the extended states that XCR0 names below. */
    mov %cr4, %eax
    or $0x40620, %eax
    mov %eax, %cr4
    mov $0xC0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~4, %eax
    or $0x80000003, %eax
    mov %eax, %cr0
    lgdt segments
    ljmp $8, $wide

    .code64
wide:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    /* x87, SSE, AVX, AVX-512, tiles and their shapes. */
    xor %ecx, %ecx
    xor %edx, %edx
    mov $0x600e7, %eax
    xsetbv
    mov $stack, %rsp
    call run
1:  hlt
    jmp 1b

    .align 8
table:
    .quad 0, 0x00209A0000000000, 0x0000920000000000
segments:
    .word segments - table - 1
    .long table

    .section .bss
    .align 4096
level4: .skip 4096
level3: .skip 4096
level2: .skip 4096
    .skip 1 << 20
stack:
